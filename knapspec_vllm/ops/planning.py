# SPDX-License-Identifier: Apache-2.0
"""The solver's and the policy's steps on the device."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.curve_tables import CurveTables, PlanChoice
from knapspec_vllm.kernels.relaxed import Relaxed
from knapspec_vllm.ops.dispatch import check, run


def dp_relax(
    full: torch.Tensor,
    window: torch.Tensor | None,
    skip: torch.Tensor | None,
    saved: torch.Tensor,
    alive: torch.Tensor,
    savings: torch.Tensor,
    *,
    rows_out: int,
    prune_cosine: float,
    max_saving: float,
    exchange_rate: float,
) -> Relaxed:
    """The branches that go on after one item, of all modes of all branches.

    full, window, skip [N, R, d]: streams after the modes of the item, row 0 the target's; window
    and skip may be None. saved [N] float32 and alive [N] bool: of the branches before the item;
    savings [3] float32: what FULL, WINDOW and SKIP save, negative to forbid a mode. rows_out: rows
    after the item, M; at most as many as there are candidates, N for an item that always runs.

    Returns, each [M]: rows int32 (index into full, window and skip stacked in this order), parents
    and modes int32, saved and error float32, alive bool. Raises ValueError for misfits.
    """
    branches = full.shape[0]
    for name, states in (("window", window), ("skip", skip)):
        if states is not None:
            check(name, states, tuple(full.shape))
    check("saved", saved, (branches,))
    check("alive", alive, (branches,))
    check("savings", savings, (3,))
    options = 1 + (window is not None) + (skip is not None)
    if not (rows_out == branches if options == 1 else 1 <= rows_out <= options * branches):
        raise ValueError(f"rows_out is {rows_out} for {branches} branches in {options} modes")
    return run(
        "dp_relax",
        full,
        full,
        window,
        skip,
        saved,
        alive,
        savings,
        rows_out=rows_out,
        prune_cosine=prune_cosine,
        max_saving=max_saving,
        exchange_rate=exchange_rate,
    )


def gather_branches(
    full: torch.Tensor, window: torch.Tensor | None, skip: torch.Tensor | None, rows: torch.Tensor
) -> torch.Tensor:
    """The streams [M, R, d] at `rows` [M] int32 of full, window and skip stacked; see dp_relax."""
    check("rows", rows, (rows.numel(),))
    return run("dp_relax", full, full, window, skip, rows, name="gather_branches")


def plan_tpt(
    curves: CurveTables,
    counts: torch.Tensor,
    alphas: torch.Tensor,
    lengths: torch.Tensor,
    corrections: torch.Tensor,
    thresholds: torch.Tensor,
    current: torch.Tensor,
    *,
    max_draft_length: int,
    paper: bool = False,
) -> PlanChoice:
    """Tokens per time of every plan and draft length for a batch, and which one to take.

    counts [P, 3] float32: items a plan runs (attention FULL, attention WINDOW, MLP); alphas [2, P]
    float32: acceptance, mean and cautious; lengths [B] int: context of each drafting row, 0 for
    padding; corrections [5] float32: factors of plain steps, verify steps and drafts, the
    microseconds a speculative round costs on top, the share of the promised tokens that is kept;
    thresholds [3] float32: hysteresis, speedup to start at, speedup to stay at; current [2] int32:
    plan (-1: none) and draft length of the last round.

    Returns choice [2] int32 (plan or -1, draft length or 0), its speedup, and the whole table
    [P, max_draft_length]. Raises ValueError for misfits.
    """
    plans = counts.shape[0]
    check("counts", counts, (plans, 3))
    check("alphas", alphas, (2, plans))
    for name, tensor, size in (
        ("corrections", corrections, 5),
        ("thresholds", thresholds, 3),
        ("current", current, 2),
    ):
        check(name, tensor, (size,))
    return run(
        "plan_tpt",
        counts,
        curves,
        counts,
        alphas,
        lengths,
        corrections,
        thresholds,
        current,
        max_draft_length=max_draft_length,
        paper=paper,
    )
