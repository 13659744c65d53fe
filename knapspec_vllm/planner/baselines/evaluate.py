# SPDX-License-Identifier: Apache-2.0
"""Runs given plans on a BranchRunner, many at once, and judges them against the target.

Plans that begin alike share what they have in common: a row of states stands for all plans that
agree so far. Which rows an item runs is worked out on the host beforehand and sent over in one
copy, so that between the items of a batch nothing waits for the device. As in the solver, row 0 is
the target, run in the same batch so that rounding is the same for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from knapspec_vllm import ops
from knapspec_vllm.planner.solver import BranchRunner
from knapspec_vllm.planner.types import Mode, Plan, PlanEstimate


@torch.no_grad()
def evaluate(
    runner: BranchRunner, plans: Sequence[Plan], live_branches: int
) -> tuple[PlanEstimate, ...]:
    """Estimates of the plans, in their order, on the runner's reference tokens.

    At most `live_branches` plans, besides the target, run at once.
    """
    if not plans:
        return ()
    # Neighbours in this order have the longest beginnings in common.
    order = sorted(range(len(plans)), key=lambda index: plans[index].modes)
    target, trials, parts = Plan.full(runner.num_layers), 0, []
    for first in range(0, len(order), live_branches):
        chunk = [plans[index] for index in order[first : first + live_branches]]
        states = run_plans(runner, [target, *chunk])
        parts.append(agreement(runner, states, live_branches)[:, 1:])
        trials = states.shape[1]
    cosines, hits = torch.cat(parts, dim=1).tolist()
    found = {
        index: estimate(plans[index], cosine, hit, trials)
        for index, cosine, hit in zip(order, cosines, hits, strict=True)
    }
    return tuple(found[index] for index in range(len(plans)))


def run_plans(runner: BranchRunner, plans: Sequence[Plan]) -> Tensor:
    """Final states of plans, [len(plans), R, d]."""
    states = runner.reference_states().unsqueeze(0)
    sizes, rows = _schedule(plans)
    at_device = ops.to_device([row for part in rows for row in part], torch.int64, states.device)
    *parents, last = at_device.split([len(part) for part in rows])
    for item, (number, parent) in enumerate(zip(sizes, parents, strict=True)):
        groups = states[parent].split(number)
        states = torch.cat([_run(runner, item, mode, groups[mode]) for mode in Mode])
    return states[last]


def agreement(runner: BranchRunner, states: Tensor, live_branches: int) -> Tensor:
    """[2, N] float32: cosine to row 0, mean over tokens, and tokens of equal top-1; [N, R, d]."""
    parts = states.split(live_branches + 1)
    tokens = torch.cat([runner.top1(part) for part in parts])
    hits = (tokens == tokens[:1]).sum(dim=1).float()
    target = states[0].float()
    cosines = [F.cosine_similarity(part.float(), target, dim=-1).mean(dim=1) for part in parts]
    return torch.stack([torch.cat(cosines), hits])


def estimate(plan: Plan, cosine: float, hits: float, trials: int) -> PlanEstimate:
    """From a column of `agreement` on the host."""
    return PlanEstimate(plan, min(max(cosine, -1.0), 1.0), int(hits), trials)


def _schedule(plans: Sequence[Plan]) -> tuple[list[list[int]], list[list[int]]]:
    """(rows of each mode of every item, their parents among the rows before it).

    Rows are ordered by mode. One more list of parents at the end: the row of each plan.
    """
    rows = [0] * len(plans)
    sizes, parents = [], []
    for item in range(len(plans[0].modes)):
        steps = [(plan.modes[item], row) for plan, row in zip(plans, rows, strict=True)]
        distinct = sorted(set(steps))
        number = {step: row for row, step in enumerate(distinct)}
        rows = [number[step] for step in steps]
        sizes.append([sum(mode is step[0] for step in distinct) for mode in Mode])
        parents.append([row for _, row in distinct])
    return sizes, [*parents, rows]


def _run(runner: BranchRunner, item: int, mode: Mode, states: Tensor) -> Tensor:
    if mode is Mode.SKIP or not len(states):
        return states
    if item % 2:
        return runner.mlp(item // 2, states)
    full, window = runner.attention(item // 2, states, mode is Mode.WINDOW)
    return full if window is None else window
