# SPDX-License-Identifier: Apache-2.0
"""Judging given plans in batches: the same as one by one, within the memory allowed."""

import pytest
import torch

from knapspec_vllm.planner.baselines.evaluate import evaluate, run_plans
from knapspec_vllm.planner.types import Mode, Plan
from tests.helpers_no_sync import no_host_sync
from tests.helpers_planner import TorchRunner, branches_run, random_model

LAYERS = 6


def runner(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (2, 32), generator=generator)
    return TorchRunner(random_model(seed, LAYERS), tokens, reference_tokens=8)


def some_plans(number, seed=0):
    """Random plans with all modes, and one of them twice."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(0, 3, (number, LAYERS), generator=generator)
    mlp = 2 * torch.randint(0, 2, (number, LAYERS), generator=generator)
    modes = torch.stack([attention, mlp], dim=2).flatten(1).tolist()
    plans = [Plan(tuple(Mode(mode) for mode in row)) for row in modes]
    return [*plans, plans[0]]


def alone(made, plan):
    """Final states [1, R, d] of one plan, item by item."""
    states = made.reference_states().unsqueeze(0)
    for layer in range(LAYERS):
        if plan.attention(layer) is not Mode.SKIP:
            full, window = made.attention(layer, states, True)
            states = full if plan.attention(layer) is Mode.FULL else window
        if plan.mlp(layer) is Mode.FULL:
            states = made.mlp(layer, states)
    return states


@pytest.mark.parametrize("at_once", [1, 4, 32])
def test_equals_plan_by_plan(at_once):
    made, plans = runner(), some_plans(20)
    target = alone(made, Plan.full(LAYERS))
    found = evaluate(made, plans, at_once)
    assert [estimate.plan for estimate in found] == plans
    assert len({estimate.hits for estimate in found}) > 3  # plans that differ are told apart
    for estimate in found:
        states = alone(made, estimate.plan)
        cosine = torch.nn.functional.cosine_similarity(states, target, dim=-1).mean()
        assert estimate.cosine == pytest.approx(float(cosine), abs=1e-5)
        assert estimate.hits == int((made.top1(states) == made.top1(target)).sum())
        assert estimate.trials == 16


def test_runs_no_more_branches_than_allowed():
    made, plans = runner(), some_plans(20)
    sizes = branches_run(made)
    evaluate(made, plans, 5)
    assert max(sizes) <= 6  # the target is one more
    assert max(sizes) > 4


def test_what_plans_have_in_common_runs_once():
    """Twelve plans that skip one item each: before it all are the target, one row."""
    made = runner()
    single = [Plan.parse(f"skip {kind}:{i}", LAYERS) for i in range(6) for kind in ("attn", "mlp")]
    sizes = branches_run(made)
    evaluate(made, single, 32)
    # Item i runs the target and the i plans that have left it before.
    assert sizes == [1 + item for item in range(12)]


def test_nothing_waits_for_the_device_within_a_batch():
    made, plans = runner(), some_plans(8)
    with torch.no_grad(), no_host_sync():
        states = run_plans(made, plans)
    assert torch.allclose(states[3], alone(made, plans[3])[0], atol=1e-4)


def test_no_plans():
    assert evaluate(runner(), [], 8) == ()
