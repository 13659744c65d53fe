# SPDX-License-Identifier: Apache-2.0
"""Which candidates go on and which plans are returned, by hand."""

import math

import torch

from knapspec_vllm import ops
from knapspec_vllm.planner.selection import EXCHANGE_RATE, pareto, smoothed_hits
from knapspec_vllm.planner.types import Plan, PlanEstimate


def select(saved: list[float], error: list[float], live: int) -> list[int]:
    """Candidates that go on when every branch may only run its item; 0 is not the target's row."""
    # One token of width 2, turned away from the target by the angle that gives the error.
    angles = [0.0, *(math.acos(1.0 - e) for e in error)]
    full = torch.tensor([[[math.cos(a), math.sin(a)]] for a in angles])
    found = ops.dp_relax(
        full,
        None,
        full,
        torch.tensor([0.0, *saved]),
        torch.ones(len(full), dtype=torch.bool),
        torch.tensor([0.0, -1.0, -1.0]),
        rows_out=live + 1,
        prune_cosine=0.0,
        max_saving=1.0,
        exchange_rate=EXCHANGE_RATE,
    )
    rows = zip(found.rows.tolist(), found.alive.tolist(), strict=True)
    return sorted(row - 1 for row, lives in rows if lives and row)


def test_select_by_hand():
    saved, error = [0.0, 0.1, 0.1, 0.3, 0.4, 0.4], [0.0, 0.01, 0.02, 0.001, 0.5, 0.2]
    # 1 and 2 are dominated by 3, 4 by 5; all three left go on.
    assert select(saved, error, 6) == [0, 3, 5]
    del saved[3], error[3]
    assert select(saved, error, 6) == [0, 1, 4]


def entry(saving: float, hits: int, cosine: float) -> tuple[float, PlanEstimate]:
    plan = Plan.parse(f"skip mlp:{int(saving * 10)}", 10)
    return saving, PlanEstimate(plan, cosine, hits, 16)


def test_pareto_keeps_what_no_heavier_plan_matches_in_cosine():
    dominated, light, similar, heavy = (
        entry(0.1, 16, 0.90), entry(0.2, 14, 0.97), entry(0.3, 16, 0.96), entry(0.4, 15, 0.80),
    )  # fmt: skip
    found = pareto([heavy, dominated, similar, light], 8)
    assert found == (light[1], similar[1], heavy[1])
    assert pareto([light, similar, heavy], 1) == (light[1],)
    assert pareto([entry(0.2, 1, 0.5), entry(0.2, 9, 0.7)], 8) == (entry(0.2, 9, 0.7)[1],)
    assert pareto([], 4) == ()


def test_hits_of_heavier_plans_are_not_believed_over_lighter_ones():
    plans = [entry(0.1, 14, 0.99), entry(0.2, 10, 0.98), entry(0.3, 15, 0.9), entry(0.4, 3, 0.8)]
    assert smoothed_hits([estimate for _, estimate in plans]) == [14.0, 12.5, 12.5, 3.0]
    other = PlanEstimate(Plan.parse("skip attn:1", 10), 0.9, 20, 32)
    assert smoothed_hits([plans[0][1], other]) == [14.0, 20.0]  # not comparable: left alone
    assert smoothed_hits([]) == []
