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
the last transfer: the loop never waits for the device and can be captured in a graph. Memory is
O(branches * R * d) plus two small integers per item and branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from knapspec_vllm.planner.selection import pareto, select
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
    prune_cosine: float = 0.5
    keep_first_layers: int = 1
    keep_last_layers: int = 1
    windows: bool = True


@dataclass
class ItemWeights:
    """What an item costs for the batch being planned, microseconds."""

    attention_full_us: float
    attention_window_us: float
    mlp_us: float


@dataclass
class _Branches:
    """Row 0 is the target, rows 1.. are partial plans. saved: share of the target's item time."""

    states: Tensor  # [N, R, d]
    saved: Tensor  # [N] float32
    error: Tensor  # [N] float32, 1 - cosine to row 0
    alive: Tensor  # [N] bool; row 0 stays True


@torch.no_grad()
def solve(
    runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
) -> tuple[PlanEstimate, ...]:
    """Plans by ascending saving, at most `bins`, none dominated; never the all-FULL plan.

    A plan is dominated if another saves as much, agrees as often and has as high a cosine. Raises
    ValueError for weights or settings that leave nothing to solve.
    """
    layers = runner.num_layers
    total_us = layers * (weights.attention_full_us + weights.mlp_us)
    if min(weights.attention_full_us, weights.mlp_us) < 0 or not total_us > 0:
        raise ValueError(f"item weights must not be negative nor all zero, got {weights}")
    if settings.live_branches < 1 or settings.bins < 1:
        raise ValueError("bins and live_branches must be at least 1")
    branches = _start(runner.reference_states(), settings.live_branches)
    number = settings.live_branches + 1
    parents = torch.zeros(2 * layers, number, dtype=torch.int32, device=branches.states.device)
    modes = torch.zeros_like(parents)
    for layer in range(layers):
        kept = layer < settings.keep_first_layers or layer >= layers - settings.keep_last_layers
        gain_us = weights.attention_full_us - weights.attention_window_us
        windowed = settings.windows and gain_us > WINDOW_MIN_GAIN * weights.attention_full_us
        window_saving = gain_us / total_us if windowed and not kept else None
        full, window = runner.attention(layer, branches.states, window_saving is not None)
        attention = _Options(full, window, window_saving, weights.attention_full_us / total_us)
        branches = _advance(
            branches, attention, kept, settings, parents[2 * layer], modes[2 * layer]
        )
        full = runner.mlp(layer, branches.states)
        mlp = _Options(full, None, None, weights.mlp_us / total_us)
        item = 2 * layer + 1
        branches = _advance(branches, mlp, kept, settings, parents[item], modes[item])
    tokens = runner.top1(branches.states)
    hits = (tokens == tokens[:1]).sum(dim=1, dtype=torch.int32)
    return _extract(branches, hits, parents, modes, settings.bins)


@dataclass
class _Options:
    """Streams after the modes of one item, and the shares of item time the modes save."""

    full: Tensor
    window: Tensor | None
    window_saving: float | None
    skip_saving: float


def _start(reference: Tensor, live: int) -> _Branches:
    """All rows hold the embedding; only the target is alive."""
    number = live + 1
    alive = torch.zeros(number, dtype=torch.bool, device=reference.device)
    alive[0] = True
    zeros = torch.zeros(number, dtype=torch.float32, device=reference.device)
    states = reference.unsqueeze(0).expand(number, -1, -1).contiguous()
    return _Branches(states, zeros, zeros.clone(), alive)


def _advance(
    branches: _Branches,
    options: _Options,
    kept: bool,
    settings: SolverSettings,
    parents: Tensor,
    modes: Tensor,
) -> _Branches:
    """Branches after one item. Writes each branch's parent row and mode, both [N]."""
    number = branches.saved.shape[0]
    target = _unit(options.full[0])
    if kept:
        error = _error(options.full, target)
        alive = branches.alive & (error <= 1.0 - settings.prune_cosine)
        parents.copy_(torch.arange(number, device=parents.device))
        return _Branches(options.full, branches.saved, error, _with_target(alive))
    pool = [(options.full, 0.0)]  # in the order of Mode
    if options.window is not None and options.window_saving is not None:
        pool.append((options.window, options.window_saving))
    pool.append((branches.states, options.skip_saving))
    states = torch.cat([state for state, _ in pool])
    saved = torch.cat([branches.saved + saving for _, saving in pool])
    error = torch.cat([_error(state, target) for state, _ in pool])
    allowed = (error <= 1.0 - settings.prune_cosine) & (saved <= settings.max_saving)
    allowed &= branches.alive.repeat(len(pool))
    allowed[0] = False  # the target goes on as row 0, not as a branch of its own
    chosen, alive = select(saved, error, allowed, settings.live_branches)
    rows = torch.cat([chosen.new_zeros(1), chosen])
    alive = torch.cat([alive.new_ones(1), alive])
    parents.copy_(rows % number)
    # Option 0, 1, .. of the pool to Mode, without a table that would have to reach the device.
    modes.copy_(rows // number * (int(Mode.SKIP) // (len(pool) - 1)))
    return _Branches(states[rows], saved[rows], error[rows], alive)


def _with_target(alive: Tensor) -> Tensor:
    alive = alive.clone()
    alive[0] = True
    return alive


def _unit(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)


def _error(states: Tensor, target: Tensor) -> Tensor:
    """[M]: 1 - cosine, mean over tokens; as a distance, exact where the cosine is close to 1."""
    return 0.5 * (_unit(states) - target).square().sum(dim=-1).mean(dim=-1)


def _extract(
    branches: _Branches, hits: Tensor, parents: Tensor, modes: Tensor, bins: int
) -> tuple[PlanEstimate, ...]:
    """The only transfer: numbers and pointers of all branches, then backtracking in Python."""
    number = branches.saved.shape[0]
    floats = torch.stack([branches.saved, branches.error]).view(torch.int32)
    flags = torch.stack([hits, branches.alive.to(torch.int32)])
    packed = torch.cat([floats, flags, parents, modes]).cpu()
    saved, error = packed[:2].view(torch.float32).tolist()
    hit_counts, alive = packed[2:4].tolist()
    items = parents.shape[0]
    parent_rows, mode_rows = packed[4 : 4 + items].tolist(), packed[4 + items :].tolist()
    trials = branches.states.shape[1]
    found: dict[Plan, tuple[float, PlanEstimate]] = {}
    for branch in range(1, number):
        if not alive[branch]:
            continue
        plan = Plan(_backtrack(parent_rows, mode_rows, branch))
        cosine = max(1.0 - error[branch], -1.0)
        estimate = PlanEstimate(plan, cosine, hit_counts[branch], trials)
        if not plan.is_full:
            found.setdefault(plan, (saved[branch], estimate))
    return pareto(list(found.values()), bins)


def _backtrack(parents: list[list[int]], modes: list[list[int]], branch: int) -> tuple[Mode, ...]:
    path = []
    for parent_row, mode_row in zip(reversed(parents), reversed(modes), strict=True):
        path.append(Mode(mode_row[branch]))
        branch = parent_row[branch]
    return tuple(reversed(path))
