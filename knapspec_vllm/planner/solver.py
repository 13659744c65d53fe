# SPDX-License-Identifier: Apache-2.0
"""Solver: finds the plans worth choosing from, by a path knapsack run on real hidden states.

Items in order; a branch is a partial plan with its residual stream. From every live branch the
item is run in every mode, in one batched pass; a candidate's value is the cosine of its stream to
the target's at the same depth, its weight the exact time it has saved; `selection.select` keeps the
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

import time
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from knapspec_vllm import ops
from knapspec_vllm.planner.selection import EXCHANGE_RATE, pareto
from knapspec_vllm.planner.types import Mode, Plan, PlanEstimate

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
    branches.grow(number)
    tokens = runner.top1(branches.states)
    hits = (tokens == tokens[:1]).sum(dim=1, dtype=torch.int32)
    floats = torch.stack([branches.saved, branches.error]).view(torch.int32)
    flags = [hits, branches.alive.to(torch.int32)]
    pointers = [_padded(row, number) for row in branches.parents + branches.modes]
    return torch.cat([floats, torch.stack(flags + pointers)])


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
        rows = len(full)
        if not kept:
            # The first items have few branches: a tenth of a solve's work, were all rows run.
            self.grow(min(settings.live_branches + 1, rows * (2 if window is None else 3)))
            rows = len(self.alive)
            full = _padded(full, rows)
            window = None if window is None else _padded(window, rows)
        skip = None if kept else self.states
        found = ops.dp_relax(
            full,
            window,
            skip,
            self.saved,
            self.alive,
            savings,
            prune_cosine=settings.prune_cosine,
            max_saving=settings.max_saving,
            exchange_rate=EXCHANGE_RATE,
        )
        self.states = full if kept else ops.gather_branches(full, window, skip, found.rows)
        self.saved, self.error, self.alive = found.saved, found.error, found.alive
        self.parents.append(found.parents)
        self.modes.append(found.modes)

    def grow(self, rows: int) -> None:
        """To at least `rows` rows; the new ones repeat the target and are dead."""
        more = rows - len(self.alive)
        if more <= 0:
            return
        self.states, self.saved = _padded(self.states, rows), _padded(self.saved, rows)
        self.alive = torch.cat([self.alive, self.alive.new_zeros(more)])
        if self.error is not None:
            self.error = _padded(self.error, rows)


def _padded(values: Tensor, rows: int) -> Tensor:
    """Row 0 repeated behind the others."""
    more = rows - len(values)
    if more <= 0:
        return values
    return torch.cat([values, values[:1].expand(more, *values.shape[1:])])


class PendingSolve:
    """A solve under way on the device, from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self._started = time.perf_counter()
        self._on_device = device.type != "cpu"
        self._begins = self._mark(device)
        self._arrived: torch.Event | None = None

    def fetch(self, packed: Tensor, trials: int, bins: int) -> None:
        """Queue the copy of run_solver's result to the host. trials: reference tokens."""
        self._trials, self._bins = trials, bins
        self._packed = packed
        if self._on_device:
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = self._mark(packed.device)
        self._queued = time.perf_counter()

    def _mark(self, device: torch.device) -> torch.Event | None:
        if not self._on_device:
            return None
        event = torch.Event(device.type, enable_timing=True)
        event.record()
        return event

    def ready(self) -> bool:
        """Whether result() would not wait."""
        return self._arrived is None or self._arrived.query()

    @property
    def host_us(self) -> float:
        """What the host had to do with it: all of it on a CPU."""
        return (self._queued - self._started) * 1e6

    @property
    def time_us(self) -> float:
        """What it took; once it is ready."""
        if self._begins is None or self._arrived is None:
            return self.host_us
        return max(self.host_us, 1e3 * self._begins.elapsed_time(self._arrived))

    def result(self) -> tuple[PlanEstimate, ...]:
        """The frontier's plans, backtracked on the host; see `solve`."""
        if self._arrived is not None:
            self._arrived.synchronize()
        floats = self._packed[:2].view(torch.float32)
        saved, error = floats.tolist()
        hits, alive, *pointers = self._packed[2:].tolist()
        parents, modes = pointers[: len(pointers) // 2], pointers[len(pointers) // 2 :]
        found: dict[Plan, tuple[float, PlanEstimate]] = {}
        for branch in range(1, len(alive)):
            if not alive[branch]:
                continue
            plan = Plan(_backtrack(parents, modes, branch))
            cosine = max(1.0 - error[branch], -1.0)
            if not plan.is_full:
                estimate = PlanEstimate(plan, cosine, hits[branch], self._trials)
                found.setdefault(plan, (saved[branch], estimate))
        return pareto(list(found.values()), self._bins)


def _backtrack(parents: list[list[int]], modes: list[list[int]], branch: int) -> tuple[Mode, ...]:
    path = []
    for parent_row, mode_row in zip(reversed(parents), reversed(modes), strict=True):
        path.append(Mode(mode_row[branch]))
        branch = parent_row[branch]
    return tuple(reversed(path))
