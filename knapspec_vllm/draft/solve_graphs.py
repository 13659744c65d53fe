# SPDX-License-Identifier: Apache-2.0
"""Solves captured once and replayed: one launch instead of some thousand.

A solve is one chain of kernels over all items. Launch by launch the host is what it waits for: 55
ms for an 8B model on an H200, where a decode step takes 5 and nobody is served meanwhile. Its
shapes depend on the number of rows and of tokens that plans are judged on, and on whether windows
are an option; all else lies in tensors whose addresses stay. So there is one graph for each such
shape, captured before the server takes requests; other shapes are solved launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.branches import VllmBranches
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.graphs import Capture
from knapspec_vllm.draft.references import References
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.planner.pending_solve import PendingSolve
from knapspec_vllm.planner.solver import ItemWeights, Savings, SolverSettings, run_solver


@dataclass(frozen=True)
class Shape:
    """What a captured solve is made for."""

    rows: int
    #: Reference tokens of each row.
    tokens: int
    windows: bool


@dataclass
class _Captured:
    """Inputs at fixed addresses, what repeats the solve over them, and where its result then is."""

    references: References
    savings: Savings
    replay: Callable[[], None]
    #: One tensor: what the last solve gave, see `run_solver`.
    results: list[torch.Tensor]


class SolveGraphs:
    """The captured solves of one engine, made by `prepare`."""

    def __init__(
        self, engine: Engine, geometry: WindowGeometry, settings: SolverSettings, capture: Capture
    ) -> None:
        self._engine, self._geometry = engine, geometry
        self._settings, self._capture = settings, capture
        self._captured: dict[Shape, _Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    @torch.inference_mode()
    def prepare(self, shapes: list[Shape]) -> None:
        """Captures solves of these shapes, the largest first: the others' memory is then there.

        Raises RuntimeError, torch.OutOfMemoryError among them.
        """
        for shape in sorted(shapes, key=lambda shape: (not shape.windows, shape.rows)):
            if self._possible(shape):
                self._captured[shape] = self._made(shape)

    @torch.inference_mode()
    def start(self, references: References, weights: ItemWeights) -> PendingSolve | None:
        """As `start_solve`; None where no solve of this shape is captured."""
        if not self._captured:
            return None
        layers, device = self._engine.view.num_layers, self._engine.device
        pending = PendingSolve(device)
        savings = Savings.of(weights, layers, self._settings.windows, device)
        rows = len(references.starts)
        found = self._captured.get(Shape(rows, len(references.tokens) // rows, savings.windows))
        if found is None:
            return None
        mine = found.references
        mine.tokens.copy_(references.tokens)
        mine.starts.copy_(references.starts)
        # Entries past a row's blocks stay from another time: nobody follows them.
        mine.block_table[:, : references.block_table.shape[1]].copy_(references.block_table)
        found.savings.attention.copy_(savings.attention)
        found.savings.mlp.copy_(savings.mlp)
        found.replay()
        pending.fetch(found.results[0], len(references.tokens), self._settings.bins)
        return pending

    def _possible(self, shape: Shape) -> bool:
        """Whether such references can come."""
        most = self._engine.vllm_config.scheduler_config.max_num_seqs
        return shape.rows <= most and shape.tokens <= self._engine.max_model_len

    def _made(self, shape: Shape) -> _Captured:
        engine, settings = self._engine, self._settings
        width = -(-engine.max_model_len // engine.block_size)
        device = engine.device
        references = References(
            tokens=torch.zeros(shape.rows * shape.tokens, dtype=torch.int64, device=device),
            # Without a prefix: the warm-up reads nothing of the cache.
            starts=torch.zeros(shape.rows, dtype=torch.int64, device=device),
            block_table=torch.zeros(shape.rows, width, dtype=torch.int32, device=device),
            # What is captured has to serve the longest context; rows are cut by their own length.
            max_start=engine.max_model_len,
        )
        both = ops.to_device([0.0, 0.01, 0.02, 0.0, -1.0, 0.02], torch.float32, device)
        savings = Savings(both[:3], both[3:], shape.windows)
        results: list[torch.Tensor] = []

        def solve() -> None:
            # Positions, too, are computed anew from `starts`.
            runner = VllmBranches(engine, self._geometry, references)
            results[:] = [run_solver(runner, runner.reference_states(), savings, settings)]

        solve()  # compiles what is missing
        return _Captured(references, savings, self._capture(solve), results)
