# SPDX-License-Identifier: Apache-2.0
"""The published planners as strategies: each does what its paper says, on small decoders.

Over 300 lines because one file holds all four to the same invariants before it tells them apart.
"""

import dataclasses
import itertools

import pytest
import torch

from knapspec_vllm.planner.baselines import NAMES, evaluate, make
from knapspec_vllm.planner.baselines.clasp import Clasp, fill_table
from knapspec_vllm.planner.baselines.early_exit import DynamicExit
from knapspec_vllm.planner.baselines.self_sd import BUDGET, SelfSpeculative
from knapspec_vllm.planner.baselines.swift import CANDIDATES, MAX_SOLVES, SKIP_RATIOS, Swift
from knapspec_vllm.planner.solver import ItemWeights, SolverSettings
from knapspec_vllm.planner.types import Mode, Plan
from tests.helpers_no_sync import no_host_sync
from tests.helpers_planner import TorchRunner, branches_run, random_model

WEIGHTS = ItemWeights(attention_full_us=40.0, attention_window_us=25.0, mlp_us=60.0)
FREE = SolverSettings(keep_first_layers=0, keep_last_layers=0, max_saving=1.0)


def runner(seed=0, layers=8, scales=None, references=16, text=0):
    generator = torch.Generator().manual_seed(100 * text + seed)
    tokens = torch.randint(0, 64, (2, 24 + references), generator=generator)
    return TorchRunner(random_model(seed, layers, scales), tokens, references)


def planted(layers=12, seed=3, text=0):
    """Two of three layers contribute next to nothing."""
    scales = [(1.0 if i % 3 == 0 else 2e-3) for i in range(layers) for _ in range(2)]
    return runner(seed, layers, scales, text=text)


def saved(plan):
    attention = plan.count("attention", Mode.SKIP) * WEIGHTS.attention_full_us
    mlp = plan.count("mlp", Mode.SKIP) * WEIGHTS.mlp_us
    return (attention + mlp) / (100.0 * plan.num_layers)


def close(found, expected):
    """The same estimates up to the rounding of another batch shape."""
    assert [e.plan for e in found] == [e.plan for e in expected]
    assert [e.hits for e in found] == [e.hits for e in expected]
    assert [e.trials for e in found] == [e.trials for e in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.cosine == pytest.approx(other.cosine, abs=1e-5)


# --- all of them ---------------------------------------------------------------------------------


def test_make():
    assert [make(name).name for name in NAMES] == list(NAMES)
    assert make("swift") is not make("swift")
    with pytest.raises(ValueError, match=r"'eagle'.*self_sd, swift, clasp, del"):
        make("eagle")


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_those_of_the_plans_and_ascend(name):
    made = runner(1)
    found = make(name).solve(made, WEIGHTS, SolverSettings())
    assert found
    close(found, evaluate(made, [estimate.plan for estimate in found], 32))
    savings = [saved(estimate.plan) for estimate in found]
    assert savings == sorted(savings)
    assert savings[0] > 0
    assert not any(estimate.plan.count("attention", Mode.WINDOW) for estimate in found)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic(name):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        strategy = make(name)
        texts = [runner(2, text=text) for text in (0, 1, 2)]
        results.append([strategy.solve(made, WEIGHTS, SolverSettings()) for made in texts])
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used up
    assert results[0] == results[1]


@pytest.mark.parametrize("name", NAMES)
def test_no_more_branches_than_allowed(name):
    made = runner(0, layers=10)
    sizes = branches_run(made)
    settings = SolverSettings(live_branches=3)
    strategy = make(name)
    found = strategy.solve(made, WEIGHTS, settings)
    assert max(sizes) <= 4  # the target is one more
    close(found, make(name).solve(runner(0, layers=10), WEIGHTS, SolverSettings()))


@pytest.mark.parametrize("name", ["self_sd", "swift", "clasp"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (2, 3), (8, 0), (5, 4)])
def test_kept_layers_run_in_full(name, first, last):
    settings = SolverSettings(keep_first_layers=first, keep_last_layers=last)
    # Where everything is free, a planner skips whatever it may.
    made = runner(0, scales=[1e-3] * 16)
    found = make(name).solve(made, WEIGHTS, settings)
    assert bool(found) == (first + last < 8)
    for estimate in found:
        assert Mode.SKIP not in estimate.plan.modes[: 2 * first]
        assert Mode.SKIP not in estimate.plan.modes[2 * (8 - last) :]


@pytest.mark.parametrize("name", ["self_sd", "swift", "clasp"])
def test_max_saving(name):
    made = runner(0, scales=[1e-3] * 16)
    for limit in (0.15, 0.3):
        settings = SolverSettings(max_saving=limit)
        found = make(name).solve(made, WEIGHTS, settings)
        assert limit / 2 < max(saved(estimate.plan) for estimate in found) <= limit + 1e-9


# --- Self-SD -------------------------------------------------------------------------------------


def test_self_sd_is_frozen():
    strategy = SelfSpeculative()
    assert strategy.resolve_every is None
    (first,) = strategy.solve(runner(2), WEIGHTS, SolverSettings())
    other = runner(2, text=1)
    sizes = branches_run(other)
    (again,) = strategy.solve(other, WEIGHTS, SolverSettings())
    assert again.plan == first.plan
    assert max(sizes) == 2  # no new search
    close((again,), evaluate(other, [first.plan], 32))
    # On the other text alone it would have found something else.
    (fresh,) = SelfSpeculative().solve(other, WEIGHTS, SolverSettings())
    assert fresh.plan != first.plan


def test_self_sd_beats_random_sets_of_the_same_saving():
    made = planted()
    (found,) = SelfSpeculative().solve(made, WEIGHTS, SolverSettings())
    assert saved(found.plan) > 0.25
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(100):
        modes = [Mode.FULL] * 24
        for kind, offset in (("attention", 0), ("mlp", 1)):
            number = found.plan.count(kind, Mode.SKIP)
            for layer in torch.randperm(10, generator=generator)[:number].tolist():
                modes[2 * (layer + 1) + offset] = Mode.SKIP
        others.append(Plan(tuple(modes)))
    assert {saved(plan) for plan in others} == {saved(found.plan)}
    hits = [estimate.hits for estimate in evaluate(made, others, 32)]
    assert found.hits > max(hits)


def test_self_sd_stays_within_its_budget():
    made = runner(1)
    tops = []
    top1 = made.top1
    made.top1 = lambda states: (tops.append(len(states)), top1(states))[1]
    SelfSpeculative().solve(made, WEIGHTS, SolverSettings())
    assert sum(tops) - len(tops) == BUDGET  # each batch has the target besides


@pytest.mark.parametrize("seed", range(6))
def test_self_sd_finds_the_best_of_few_sets(seed):
    """Where every set can be tried, the best by predicted speedup, with and without a head."""
    made = runner(seed, layers=3)
    every = [
        Plan(tuple(Mode(2 * skip) for skip in skips))
        for skips in itertools.product((0, 1), repeat=6)
        if any(skips)
    ]
    estimates = evaluate(made, every, 32)
    savings = []
    for fixed_us in (0.0, 300.0, 600.0):

        def speedup(estimate, fixed_us=fixed_us):
            alpha = (estimate.hits + 0.5) / (estimate.trials + 1)
            draft_us = 300.0 * (1.0 - saved(estimate.plan)) + fixed_us
            return max(
                sum(alpha**i for i in range(g + 1))
                * (300.0 + fixed_us)
                / (g * draft_us + 300.0 + fixed_us)
                for g in range(1, 9)
            )

        weights = dataclasses.replace(WEIGHTS, fixed_us=fixed_us)
        (found,) = SelfSpeculative().solve(made, weights, FREE)
        assert speedup(found) == pytest.approx(max(map(speedup, estimates)))
        assert speedup(found) > sorted(map(speedup, estimates))[-2] - 1e-9
        savings.append(saved(found.plan))
    # A fixed part makes every saving worth less, and no acceptance.
    assert savings == sorted(savings, reverse=True)
    assert savings[2] < savings[0]


# --- SWIFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_swift_incumbents_never_get_worse_on_the_same_tokens(seed):
    strategy, made = Swift(), runner(seed, layers=12)
    history = [strategy.solve(made, WEIGHTS, SolverSettings()) for _ in range(8)]
    keys = [{len(skipped(e.plan)): (e.hits, e.cosine) for e in estimates} for estimates in history]
    assert all(set(row) == set(keys[0]) and len(row) == len(SKIP_RATIOS) for row in keys)
    improved = 0
    for before, after in itertools.pairwise(keys):
        for level, (hits, cosine) in before.items():
            assert after[level] >= (hits, cosine - 1e-5)
            improved += after[level][0] > hits
    assert improved >= 3


def skipped(plan):
    return [item for item, mode in enumerate(plan.modes) if mode is Mode.SKIP]


def test_swift_has_a_set_for_every_ratio():
    found = Swift().solve(runner(0, layers=12), WEIGHTS, SolverSettings())
    assert sorted(len(skipped(e.plan)) for e in found) == [2, 4, 6, 9]  # of 20 items


def test_swift_judges_anew_on_new_tokens():
    """A set that was lucky on old tokens is measured on the new ones, and replaced by a better."""
    strategy = Swift()
    replaced = 0
    before = strategy.solve(runner(1), WEIGHTS, SolverSettings())
    for text in range(1, 5):
        made = runner(1, text=text)
        found = strategy.solve(made, WEIGHTS, SolverSettings())
        close(found, evaluate(made, [e.plan for e in found], 32))
        old = {len(skipped(e.plan)): e for e in evaluate(made, [e.plan for e in before], 32)}
        for estimate in found:
            incumbent = old[len(skipped(estimate.plan))]
            assert estimate.hits >= incumbent.hits
            replaced += estimate.plan != incumbent.plan
        before = found
    assert replaced >= 2


def test_swift_stops_when_agreement_is_high():
    strategy, made = Swift(), runner(0, scales=[1e-3] * 16)
    strategy.solve(made, WEIGHTS, SolverSettings())
    assert strategy.resolve_every  # a first score may be luck
    first = strategy.solve(made, WEIGHTS, SolverSettings())
    assert strategy.resolve_every is None
    sizes = branches_run(made)
    assert strategy.solve(made, WEIGHTS, SolverSettings()) == first
    assert max(sizes) <= 1 + len(SKIP_RATIOS)  # only the sets it has


def test_swift_stops_after_a_number_of_solves():
    strategy, made = Swift(), runner(1, scales=[1.0] * 16)
    for _ in range(MAX_SOLVES):
        assert strategy.resolve_every is not None
        strategy.solve(made, WEIGHTS, SolverSettings())
    assert strategy.resolve_every is None
    sizes = branches_run(made)
    strategy.solve(made, WEIGHTS, SolverSettings())
    assert max(sizes) <= 1 + len(SKIP_RATIOS)


def test_swift_tries_a_bounded_number_of_sets():
    strategy, made = Swift(), runner(1, layers=12)
    tops = []
    top1 = made.top1
    made.top1 = lambda states: (tops.append(len(states) - 1), top1(states))[1]
    for expected in (CANDIDATES, CANDIDATES + len(SKIP_RATIOS)):
        tops.clear()
        strategy.solve(made, WEIGHTS, SolverSettings())
        assert sum(tops) == expected


# --- CLaSp ---------------------------------------------------------------------------------------


def layer_states(made, skip):
    """[R, d] after every layer, running from the embedding those that are not in `skip`."""
    states, after = made.reference_states().unsqueeze(0), []
    for layer in range(made.num_layers):
        if layer not in skip:
            states = made.mlp(layer, made.attention(layer, states, False)[0])
        after.append(states[0])
    return after


def recurrence(made, most):
    """CLaSp's double loop, cell by cell, every state computed from scratch: j -> skipped layers."""
    target = layer_states(made, set())
    table = {0: set()}
    for layer in range(made.num_layers):
        cells = {}
        for j in range(min(layer + 1, most) + 1):
            options = []
            if j in table:
                options.append(table[j])
            if j - 1 in table:
                options.append(table[j - 1] | {layer})

            def closeness(skip, layer=layer):
                state = layer_states(made, skip)[layer]
                return torch.nn.functional.cosine_similarity(state, target[layer], dim=-1).mean()

            cells[j] = max(options, key=closeness)
        table = cells
    return table


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2, 5])
def test_clasp_equals_its_recurrence(seed, most):
    made = runner(seed, layers=5)
    settings = SolverSettings(keep_first_layers=0, keep_last_layers=0, max_saving=most / 5)
    expected = recurrence(made, most)
    target = layer_states(made, set())[-1]
    states, choices = fill_table(made, most, settings)
    for j in range(most + 1):
        assert torch.allclose(states[j], layer_states(made, expected[j])[-1], atol=1e-4)
    assert choices.shape == (5, most + 1)
    found = {len(skipped(e.plan)) // 2: e for e in Clasp().solve(made, WEIGHTS, settings)}
    assert found
    cosines = {
        j: float(torch.nn.functional.cosine_similarity(states[j], target, dim=-1).mean())
        for j in range(1, most + 1)
    }
    for j in range(1, most + 1):
        dominated = any(cosines[more] >= cosines[j] for more in range(j + 1, most + 1))
        assert (j in found) == (not dominated)
        if j in found:
            layers = sorted(expected[j])
            assert skipped(found[j].plan) == [2 * i + k for i in layers for k in (0, 1)]
            assert found[j].cosine == pytest.approx(cosines[j], abs=1e-5)


def test_clasp_finds_planted_free_layers():
    made = planted(layers=15)
    found = {len(skipped(e.plan)) // 2: e for e in Clasp().solve(made, WEIGHTS, SolverSettings())}
    layers = {item // 2 for item in skipped(found[8].plan)}
    assert len(layers & {i for i in range(15) if i % 3}) == 8
    assert found[8].cosine > 0.999


def test_clasp_fills_its_table_without_waiting_for_the_device():
    made = runner(0)
    with torch.no_grad(), no_host_sync():
        states, _ = fill_table(made, 5, SolverSettings())
    assert len(states) == 6


def test_clasp_keeps_as_many_plans_as_there_are_bins():
    made = runner(0, layers=12, scales=[0.1] * 24)
    many = Clasp().solve(made, WEIGHTS, SolverSettings())
    few = Clasp().solve(made, WEIGHTS, SolverSettings(bins=3))
    assert len(few) <= 3 < len(many)


# --- DEL -----------------------------------------------------------------------------------------


def test_del_judges_every_exit_with_one_pass_of_the_target():
    made = runner(1)
    sizes = branches_run(made)
    # The last layers may be skipped whatever the settings say; the first may not.
    settings = SolverSettings(keep_first_layers=2, keep_last_layers=3, max_saving=0.1)
    found = DynamicExit().solve(made, WEIGHTS, settings)
    assert sizes == [1] * 16
    expected = [Plan((Mode.FULL,) * 2 * e + (Mode.SKIP,) * 2 * (8 - e)) for e in range(7, 1, -1)]
    assert [estimate.plan for estimate in found] == expected
    for estimate in found:
        close((estimate,), evaluate(made, [estimate.plan], 1))
    assert len({estimate.hits for estimate in found}) > 2


def test_del_leaves_early_where_the_later_layers_do_nothing():
    made = runner(0, scales=[1.0] * 6 + [1e-4] * 10)
    found = {e.plan.count("mlp", Mode.FULL): e for e in DynamicExit().solve(made, WEIGHTS, FREE)}
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    assert found[3].hits == found[3].trials
    assert found[1].hits < 0.9 * found[1].trials


def test_del_with_nothing_to_leave():
    assert DynamicExit().solve(runner(0), WEIGHTS, SolverSettings(keep_first_layers=9)) == ()
