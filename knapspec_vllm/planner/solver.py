# SPDX-License-Identifier: Apache-2.0
"""Solver: finds the plans worth choosing from, by a path knapsack run on real hidden states.

Items in order; a branch is a partial plan with its residual stream. From every live branch the
item is run in every mode, in one batched pass; a candidate's value is the cosine of its stream to
the target's at the same depth, its weight the exact time it has saved; `ops.dp_relax` chooses the
branches that go on. The target itself runs along as branch 0, so nothing has to be collected
beforehand. After KnapSpec (arXiv 2602.20217, Algorithm 1), which keeps one state per integer
weight and advances one state at a time.

The recurrence is greedy, there as here: a branch dropped at some depth might have recovered. Cosine
only nominates; what the caller gets to judge a plan by is its top-1 agreement.

Shapes are fixed by the settings, dead branches are masked, no tensor value reaches Python before
the last transfer: the loop never waits for the device and can be captured in a graph. The result,
a few kilobytes, comes back in one asynchronous copy; `PendingSolve` is the wait for it. Memory is
O(branches * R * d) plus two small integers per item and branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from knapspec_vllm import ops
from knapspec_vllm.planner.pending_solve import PendingSolve
from knapspec_vllm.planner.selection import EXCHANGE_RATE
from knapspec_vllm.planner.types import PlanEstimate

WINDOW_MIN_GAIN = 0.03
"""WINDOW is an option only where it saves at least this share of a FULL attention."""


class BranchRunner(Protocol):
    """Runs single items of the target on the states of N branches, [N, R, d]."""

    num_layers: int

    def reference_states(self) -> Tensor:
        """[R, d] residual stream after the embedding; R reference tokens packed over rows."""

    def attention(self, layer: int, states: Tensor, window: bool) -> tuple[Tensor, Tensor | None]:
        """Streams after FULL attention, residual included, and after WINDOW if asked for.

        A branch's tokens see their row's shared prefix and the branch's own earlier tokens.
        """

    def mlp(self, layer: int, states: Tensor) -> Tensor:
        """Streams after the MLP, residual included."""

    def top1(self, states: Tensor) -> Tensor:
        """[N, R] int64: most likely next token of every reference token."""


@dataclass(frozen=True)
class SolverSettings:
    """The fields of KnapSpecConfig that the solver reads, with the same meaning."""

    bins: int = 32
    live_branches: int = 32
    max_saving: float = 0.75
    prune_cosine: float = 0.85
    keep_first_layers: int = 1
    keep_last_layers: int = 1
    windows: bool = True

    @classmethod
    def of(cls, config: Any) -> SolverSettings:
        """The same fields of a KnapSpecConfig."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass
class ItemWeights:
    """What an item costs for the batch being planned, microseconds."""

    attention_full_us: float
    attention_window_us: float
    mlp_us: float
    fixed_us: float = 0.0
    """Of a draft forward, besides its items; what a plan saves does not depend on it."""


@dataclass
class Savings:
    """What each mode of an item saves, as a share of the target's item time."""

    # [3] float32 over Mode: FULL, WINDOW, SKIP; negative = not an option
    attention: Tensor
    # [3] float32
    mlp: Tensor
    #: Whether WINDOW is worth computing; decided on the host, as it changes the shapes.
    windows: bool

    @classmethod
    def of(cls, weights: ItemWeights, layers: int, windows: bool, device: torch.device) -> Savings:
        """Raises ValueError for weights that leave nothing to solve."""
        total_us = layers * (weights.attention_full_us + weights.mlp_us)
        if min(weights.attention_full_us, weights.mlp_us) < 0 or not total_us > 0:
            raise ValueError(f"item weights must not be negative nor all zero, got {weights}")
        gain_us = weights.attention_full_us - weights.attention_window_us
        windows = windows and gain_us > WINDOW_MIN_GAIN * weights.attention_full_us
        attention = [0.0, gain_us if windows else -total_us, weights.attention_full_us]
        mlp = [0.0, -total_us, weights.mlp_us]
        shares = [time_us / total_us for time_us in attention + mlp]
        both = ops.to_device(shares, torch.float32, device)
        return cls(both[:3], both[3:], windows)


def solve(
    runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
) -> tuple[PlanEstimate, ...]:
    """Plans by ascending saving, at most `bins`, none dominated; never the all-FULL plan.

    A plan is dominated if another saves as much and has as high a cosine. Waits
    for the device; `start_solve` does not. Raises ValueError for weights or settings that leave
    nothing to solve.
    """
    return start_solve(runner, weights, settings).result()


def start_solve(
    runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
) -> PendingSolve:
    """Queues a solve on the device and the copy of its result, and returns at once."""
    if settings.live_branches < 1 or settings.bins < 1:
        raise ValueError("bins and live_branches must be at least 1")
    reference = runner.reference_states()
    pending = PendingSolve(reference.device)
    savings = Savings.of(weights, runner.num_layers, settings.windows, reference.device)
    packed = run_solver(runner, reference, savings, settings)
    pending.fetch(packed, reference.shape[0], settings.bins)
    return pending


@torch.no_grad()
def run_solver(
    runner: BranchRunner, reference: Tensor, savings: Savings, settings: SolverSettings
) -> Tensor:
    """The device's part: reference states [R, d] -> [4 + 4L, live_branches + 1] int32.

    Columns are branches, column 0 the target. Rows: share saved and error (float32 bits), hits,
    alive, then each item's parent columns, then each item's modes.
    """
    layers, number = runner.num_layers, settings.live_branches + 1
    alive = torch.ones(1, dtype=torch.bool, device=reference.device)
    branches = _Branches(reference[None], torch.zeros(1, device=reference.device), alive)
    for layer in range(layers):
        kept = layer < settings.keep_first_layers or layer >= layers - settings.keep_last_layers
        full, window = runner.attention(layer, branches.states, savings.windows and not kept)
        branches.advance(full, window, kept, savings.attention, settings)
        full = runner.mlp(layer, branches.states)
        branches.advance(full, None, kept, savings.mlp, settings)
    tokens = runner.top1(branches.states)
    hits = (tokens == tokens[:1]).sum(dim=1, dtype=torch.int32)
    floats = torch.stack([branches.saved, branches.error]).view(torch.int32)
    flags = [hits, branches.alive.to(torch.int32)]
    rows = [*floats, *flags, *branches.parents, *branches.modes]
    # Dead columns behind each row; rows of one length at a time, as every item's would be launches.
    alike = [torch.stack(list(group)) for _, group in groupby(rows, key=len)]
    return torch.cat([F.pad(group, (0, number - group.shape[1])) for group in alike])


@dataclass
class _Branches:
    """Row 0 is the target, rows 1.. are partial plans. As many rows as branches may be alive."""

    states: Tensor
    """[N, R, d]."""
    saved: Tensor
    """[N] float32, share of the target's item time."""
    alive: Tensor
    """[N] bool; row 0 stays True."""
    error: Tensor | None = None
    """[N] float32, 1 - cosine to row 0; None before the first item."""
    parents: list[Tensor] = field(default_factory=list)
    modes: list[Tensor] = field(default_factory=list)

    def advance(
        self,
        full: Tensor,
        window: Tensor | None,
        kept: bool,
        savings: Tensor,
        settings: SolverSettings,
    ) -> None:
        """From before an item to after it; full, window [N, R, d]: streams after the item."""
        skip = None if kept else self.states
        rows = len(full)
        if not kept:
            # The first items have few branches: a tenth of a solve's work, were all rows run.
            rows = min(settings.live_branches + 1, rows * (2 if window is None else 3))
        found = ops.dp_relax(
            full,
            window,
            skip,
            self.saved,
            self.alive,
            savings,
            rows_out=rows,
            prune_cosine=settings.prune_cosine,
            max_saving=settings.max_saving,
            exchange_rate=EXCHANGE_RATE,
        )
        self.states = full if kept else ops.gather_branches(full, window, skip, found.rows)
        self.saved, self.error, self.alive = found.saved, found.error, found.alive
        self.parents.append(found.parents)
        self.modes.append(found.modes)
