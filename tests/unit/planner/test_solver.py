# SPDX-License-Identifier: Apache-2.0
"""The solver on small decoders: what it may choose, what it reports, what it never does."""

import itertools

import pytest
import torch

from knapspec_vllm.planner.solver import ItemWeights, SolverSettings, solve
from knapspec_vllm.planner.types import Mode, Plan
from tests.helpers_planner import TorchRunner, random_model

WEIGHTS = ItemWeights(attention_full_us=40.0, attention_window_us=25.0, mlp_us=60.0)


def runner(seed=0, layers=6, scales=None, rows=2, references=8):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (rows, 24 + references), generator=generator)
    return TorchRunner(random_model(seed, layers, scales), tokens, references)


def saving_us(plan, weights=WEIGHTS):
    window_us = weights.attention_full_us - weights.attention_window_us
    return (
        plan.count("attention", Mode.SKIP) * weights.attention_full_us
        + plan.count("attention", Mode.WINDOW) * window_us
        + plan.count("mlp", Mode.SKIP) * weights.mlp_us
    )


def run_plan(made, plan):
    """Final states [R, d] of one plan, item by item, without the solver."""
    states = made.reference_states().unsqueeze(0)
    for layer in range(made.num_layers):
        if plan.attention(layer) is not Mode.SKIP:
            full, window = made.attention(layer, states, True)
            states = full if plan.attention(layer) is Mode.FULL else window
        if plan.mlp(layer) is Mode.FULL:
            states = made.mlp(layer, states)
    return states


@pytest.mark.parametrize("seed", range(4))
def test_estimates_are_those_of_the_plan_itself(seed):
    """Backtracking returns the path that was run: replaying it gives the same numbers."""
    made = runner(seed)
    target = run_plan(made, Plan.full(made.num_layers))
    found = solve(made, WEIGHTS, SolverSettings(prune_cosine=0.2))
    assert len(found) >= 5
    assert any(e.plan.count("attention", Mode.WINDOW) for e in found)
    for estimate in found:
        states = run_plan(made, estimate.plan)
        cosine = torch.nn.functional.cosine_similarity(states, target, dim=-1).mean()
        assert estimate.cosine == pytest.approx(float(cosine), abs=1e-5)
        assert estimate.trials == 16
        assert estimate.hits == int((made.top1(states) == made.top1(target)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_frontier_ascends_undominated_within_the_limits(seed):
    settings = SolverSettings(max_saving=0.4, prune_cosine=0.5, bins=6)
    found = solve(runner(seed), WEIGHTS, settings)
    assert 1 <= len(found) <= 6
    savings = [saving_us(e.plan) for e in found]
    assert savings == sorted(savings)
    assert savings[0] > 0
    assert savings[-1] <= 0.4 * 600.0 + 1e-3
    assert all(e.cosine >= 0.5 - 1e-6 for e in found)
    for one, more in itertools.combinations(found, 2):
        assert one.hits > more.hits or one.cosine > more.cosine


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (2, 1), (6, 0)])
def test_kept_layers_run_in_full(first, last):
    settings = SolverSettings(keep_first_layers=first, keep_last_layers=last, prune_cosine=-1.0)
    found = solve(runner(), WEIGHTS, settings)
    for estimate in found:
        for layer in (*range(first), *range(6 - last, 6)):
            assert estimate.plan.attention(layer) is Mode.FULL
            assert estimate.plan.mlp(layer) is Mode.FULL
    assert bool(found) == (first < 6)
    touched = {i for e in found for i in range(6) if e.plan.modes[2 * i : 2 * i + 2] != (0, 0)}
    if found:
        assert touched == set(range(first, 6 - last))


@pytest.mark.parametrize(
    ("allowed", "window_us", "expected"),
    [(True, 25.0, True), (False, 25.0, False), (True, 39.0, False), (True, 45.0, False)],
)
def test_window_is_offered_only_where_it_saves(allowed, window_us, expected):
    weights = ItemWeights(40.0, window_us, 60.0)
    asked = []
    made = runner()
    attention = made.attention
    made.attention = lambda *arguments: (asked.append(arguments[2]), attention(*arguments))[1]
    found = solve(made, weights, SolverSettings(windows=allowed))
    assert any(asked) is expected
    if not expected:
        assert not any(e.plan.count("attention", Mode.WINDOW) for e in found)
    assert asked[0] is False  # layer 0 is kept


@pytest.mark.parametrize("live", [4, 8, 32])
def test_finds_planted_free_items(live):
    """Two of three layers contribute next to nothing; the lightest item is 1 of 60 us times 60."""
    layers = 30
    scales = [(1.0 if i % 3 == 0 else 2e-3) for i in range(layers) for _ in range(2)]
    made = runner(3, layers, scales)
    found = solve(made, ItemWeights(1.0, 1.0, 3.0), SolverSettings(live_branches=live))
    best = 0.0
    for estimate in found:
        skipped = [mode is Mode.SKIP for mode in estimate.plan.modes]
        planted = [skipped[i] for i in range(60) if (i // 2) % 3]
        original = [skipped[i] for i in range(60) if (i // 2) % 3 == 0]
        if sum(original) <= 0.1 * len(original):
            best = max(best, sum(planted) / len(planted))
    assert best >= 0.9


def test_an_unimportant_light_item_is_skipped_first():
    scales = [1.0] * 12
    scales[2 * 3] = 1e-3  # attention of layer 3, the lightest kind of item
    found = solve(runner(1, 6, scales), ItemWeights(1.0, 1.0, 9.0), SolverSettings())
    assert found[0].plan == Plan.parse("skip attn:3", 6)
    assert found[0].cosine > 0.999


def test_solving_twice_gives_the_same():
    assert solve(runner(2), WEIGHTS, SolverSettings()) == solve(
        runner(2), WEIGHTS, SolverSettings()
    )


def test_nothing_but_full_survives_an_unreachable_cosine():
    assert solve(runner(0), WEIGHTS, SolverSettings(prune_cosine=1.0)) == ()


@pytest.mark.parametrize("weights", [ItemWeights(0.0, 0.0, 0.0), ItemWeights(-1.0, 0.0, 5.0)])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="item weights"):
        solve(runner(), weights, SolverSettings())


def test_memory_does_not_grow_with_depth():
    """What the solver keeps between items is one set of states, whatever the number of layers."""
    made = runner(0, 12)
    live = []
    mlp = made.mlp
    made.mlp = lambda layer, states: (live.append(states.shape), mlp(layer, states))[1]
    solve(made, WEIGHTS, SolverSettings(live_branches=5))
    # The first items have fewer branches: 1, and twice as many with every item that may be skipped.
    assert [shape[0] for shape in live] == [1, 3, *[6] * 10]
    assert {shape[1:] for shape in live} == {torch.Size([16, 32])}
