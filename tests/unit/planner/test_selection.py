# SPDX-License-Identifier: Apache-2.0
"""Which candidates go on and which plans are returned, by hand."""

import torch

from knapspec_vllm.planner.selection import pareto, select
from knapspec_vllm.planner.types import Plan, PlanEstimate


def test_select_by_hand():
    saved = torch.tensor([0.0, 0.1, 0.1, 0.3, 0.4, 0.4])
    error = torch.tensor([0.0, 0.01, 0.02, 0.001, 0.5, 0.2])
    allowed = torch.tensor([True] * 6)
    chosen, alive = select(saved, error, allowed, 4)
    # 1 and 2 are dominated by 3, 4 by 5; of the three left each leads its own range.
    assert sorted(chosen[alive].tolist()) == [0, 3, 5]
    allowed[3] = False
    chosen, alive = select(saved, error, allowed, 4)
    assert sorted(chosen[alive].tolist()) == [0, 1, 5]
    chosen, alive = select(saved, error, torch.zeros(6, dtype=torch.bool), 4)
    assert not alive.any()
    chosen, alive = select(saved[:2], error[:2], allowed[:2], 4)
    assert chosen.shape == alive.shape == (4,)
    assert chosen[alive].tolist() in ([0, 1], [1, 0])


def test_select_in_a_crowded_range_takes_the_cheap_skip():
    """Executing has the higher cosine; skipping wins its range all the same."""
    saved = torch.tensor([0.50, 0.51, 1.0])
    error = torch.tensor([0.0100, 0.0101, 0.9])
    chosen, alive = select(saved, error, torch.ones(3, dtype=torch.bool), 1)
    assert chosen.tolist() == [1]
    assert alive.all()


def test_select_keeps_the_first_of_equals():
    same = torch.full((5,), 0.2)
    chosen, alive = select(same, same, torch.ones(5, dtype=torch.bool), 2)
    assert chosen[alive].tolist() == [0]


def test_pareto_keeps_hits_or_cosine():
    def entry(saving, hits, cosine):
        plan = Plan.parse(f"skip mlp:{int(saving * 10)}", 10)
        return saving, PlanEstimate(plan, cosine, hits, 16)

    dominated, light, similar, heavy = (
        entry(0.1, 14, 0.90), entry(0.2, 16, 0.95), entry(0.3, 14, 0.96), entry(0.4, 15, 0.80),
    )  # fmt: skip
    found = pareto([heavy, dominated, similar, light], 8)
    assert found == (light[1], similar[1], heavy[1])
    assert pareto([light, similar, heavy], 1) == (light[1],)
    assert pareto([], 4) == ()
