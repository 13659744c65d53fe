# SPDX-License-Identifier: Apache-2.0
"""Beta estimates: priors, feedback, forgetting.

Over 300 lines because every test reads the same model of a few plans.
"""

import math
import random

import pytest

from knapspec_vllm.planner.acceptance import (
    BORROWED_TRIALS,
    NEUTRAL_ALPHA,
    AcceptanceModel,
)
from knapspec_vllm.planner.objective import expected_tokens
from knapspec_vllm.planner.slope import distance_of
from knapspec_vllm.planner.types import Plan, PlanEstimate
from tests.helpers_policy import accepted_tokens

PLAN = Plan.parse("skip mlp:1", 4)
OTHER = Plan.parse("skip mlp:1-3", 4)


def prior(
    model: AcceptanceModel, plan: Plan, hits: int, trials: int, cosine: float = 0.998
) -> None:
    model.priors([PlanEstimate(plan, cosine, hits, trials)])


def test_prior_shrinks_toward_what_the_distance_says_by_hand():
    model = AcceptanceModel(prior_weight=8.0)
    prior(model, PLAN, 31, 32, 0.9995)
    prior(model, OTHER, 20, 32, 0.98)
    slope = model._slope.value
    assert slope == model._slope.solver == pytest.approx(1.9, abs=0.4)
    for plan, hits, distance in ((PLAN, 31, 0.001**0.5), (OTHER, 20, 0.2)):
        expected = math.exp(-slope * distance)
        assert model.alpha(plan) == pytest.approx((0.5 * hits + 8 * expected) / (16 + 8))
    assert model.alpha(PLAN) < 1.0


def test_unknown_plan_is_neutral():
    model = AcceptanceModel()
    assert model.alpha(PLAN) == pytest.approx(NEUTRAL_ALPHA)
    assert AcceptanceModel(prior_weight=0.0).alpha(PLAN) == pytest.approx(NEUTRAL_ALPHA)


def test_setting_a_prior_again_replaces_it():
    model = AcceptanceModel()
    prior(model, PLAN, 30, 32)
    once = model.alpha(PLAN)
    prior(model, PLAN, 30, 32)
    assert model.alpha(PLAN) == pytest.approx(once)


def test_feedback_counts_one_failure_at_most():
    model = AcceptanceModel(prior_weight=0.0, feedback_half_life=1e12)
    model.observe(PLAN, [(3, 8)])  # 3 successes, 1 failure, 4 unknown
    assert model.alpha(PLAN) == pytest.approx(3 / 4)
    model.observe(PLAN, [(4, 4)])
    assert model.alpha(PLAN) == pytest.approx(7 / 8)
    model.observe(PLAN, [(0, 0)])
    assert model.alpha(PLAN) == pytest.approx(7 / 8)


def test_half_life():
    model = AcceptanceModel(prior_weight=0.0, feedback_half_life=16.0)
    model.observe(PLAN, [(8, 8)])
    for _ in range(2):  # 16 drafted tokens later the first 8 successes count 4
        model.observe(PLAN, [(0, 8)])
    assert model.alpha(PLAN) == pytest.approx(4 / (4 + 1 + 0.5**0.5))


def test_feedback_finds_the_truth():
    model, generator = AcceptanceModel(), random.Random(0)
    prior(model, PLAN, 32, 32)
    for _ in range(300):
        model.observe(PLAN, [(accepted_tokens(generator, 0.6, 5), 5)])
    # Half a life of 256 drafted tokens remembers about 180 verified ones: s.e. 0.036.
    assert model.alpha(PLAN) == pytest.approx(0.6, abs=0.1)
    assert model.drift(PLAN) == pytest.approx(0.6 - 0.98, abs=0.13)


def test_drift_at_a_length_is_not_hidden_by_what_another_showed():
    model = AcceptanceModel(feedback_half_life=1e12)
    prior(model, PLAN, 90, 100)
    model.observe(PLAN, [(350, 350)], 500)
    for _ in range(40):
        model.observe(PLAN, [(1, 5)], 20_000)
    assert model.drift(PLAN, 20_000) < -0.15 < model.drift(PLAN)
    assert model.drift(PLAN, 500) > -0.05


def test_every_length_of_context_has_its_own_acceptance():
    """What other lengths show counts as BORROWED_TRIALS tokens, until a length has shown enough."""
    model = AcceptanceModel(feedback_half_life=1e12)
    prior(model, PLAN, 31, 32)
    for _ in range(100):
        model.observe(PLAN, [(8, 8)], 2000)
    assert model.alpha(PLAN, 1500) == model.alpha(PLAN, 4000)
    assert model.lower(PLAN, 5000) < model.lower(PLAN, 2000)
    mean, weight = model._posterior(PLAN, 2000)[0] - 800, 0.5 * 32 + 16
    borrowed = (mean + BORROWED_TRIALS) / (weight + BORROWED_TRIALS)
    assert model.alpha(PLAN, 5000) == pytest.approx(borrowed)
    version = model.version
    for _ in range(50):
        model.observe(PLAN, [(4, 8)], 5000)
    assert model.version > version
    mean = model._posterior(PLAN, 2000)[0] - 800 - 200 * 64 / 250
    here = (mean + 200 + BORROWED_TRIALS) / (weight + 250 + BORROWED_TRIALS)
    assert model.alpha(PLAN, 5000) == pytest.approx(here)
    assert model.alpha(PLAN, 5000) < 0.86 < 0.9 < model.alpha(PLAN, 2000)
    assert model.alpha(PLAN, 5000) < model.alpha(PLAN) < model.alpha(PLAN, 2000)
    # Another length borrows from both, and forgetting takes all of it.
    assert model.alpha(PLAN, 5000) < model.alpha(PLAN, 99999) < model.alpha(PLAN, 2000)
    model.forget(share=1.0)
    assert model.alpha(PLAN, 5000) == model.alpha(PLAN, 2000)


def mixed(first: float, second: float, rounds: int) -> tuple[AcceptanceModel, float]:
    """Rows of two acceptances in turn, four tokens each; and what was accepted of a draft."""
    model, generator, total = AcceptanceModel(feedback_half_life=1e12), random.Random(1), 0
    prior(model, PLAN, 31, 32)
    for number in range(2 * rounds):
        accepted = accepted_tokens(generator, (first, second)[number % 2], 4)
        model.observe(PLAN, [(accepted, 4)], 500)
        total += accepted
    return model, total / rounds / 2


def test_all_rows_of_a_round_count_alike():
    """Forgotten row by row, the last 90 of 256 rows would be all that is known."""
    model = AcceptanceModel()
    prior(model, PLAN, 31, 32)
    model.observe(PLAN, [(4, 4)] * 128 + [(0, 4)] * 128, 500)
    assert model.alpha(PLAN, 500) == pytest.approx(0.8, abs=0.02)
    other = AcceptanceModel()
    prior(other, PLAN, 31, 32)
    other.observe(PLAN, [(0, 4)] * 128 + [(4, 4)] * 128, 500)
    assert other.alpha(PLAN, 500) == model.alpha(PLAN, 500)


def test_a_shortfall_is_learned_at_the_default_half_life():
    """Two of four tokens in the mean, where an acceptance of 0.8 promises 2.36."""
    model = AcceptanceModel()
    prior(model, PLAN, 31, 32)
    for _ in range(200):
        model.observe(PLAN, [(4, 4), (0, 4)], 500)
    promised = expected_tokens(model.alpha(PLAN, 500), 4) - 1.0
    assert promised > 2.3
    assert model.kept(500) * promised == pytest.approx(2.0, rel=0.03)


def test_rows_that_differ_keep_less_than_one_acceptance_promises():
    model, accepted = mixed(0.98, 0.5, 2000)
    promised = expected_tokens(model.alpha(PLAN, 500), 4) - 1.0
    assert accepted < 0.95 * promised
    assert accepted == pytest.approx(model.kept(500) * promised, rel=0.02)
    assert model.kept(5000) == 1.0  # nothing was seen there
    alike, accepted = mixed(0.8, 0.8, 2000)
    assert alike.kept(500) == pytest.approx(1.0, abs=0.02)
    model.forget(share=1.0)
    assert model.kept(500) == 1.0


def test_luck_promises_no_more_than_acceptance():
    model = AcceptanceModel()
    prior(model, PLAN, 16, 32)
    for _ in range(10):
        model.observe(PLAN, [(8, 8)])
    assert model.kept(0) == 1.0


def test_drift_waits_for_data():
    model = AcceptanceModel()
    prior(model, PLAN, 32, 32)
    model.observe(PLAN, [(0, 8)])
    assert model.drift(PLAN) == 0.0
    assert model.drift(OTHER) == 0.0


def test_lower_bound_tightens_with_data():
    model = AcceptanceModel()
    prior(model, PLAN, 29, 32)
    gap = model.alpha(PLAN) - model.lower(PLAN)
    mean = model.alpha(PLAN)
    assert gap == pytest.approx((mean * (1 - mean) / (16 + 16 + 1)) ** 0.5)
    for _ in range(20):
        model.observe(PLAN, [(7, 8)])
    assert model.alpha(PLAN) - model.lower(PLAN) < gap / 1.5
    assert model.lower(PLAN, z=100.0) == 0.0


def test_version_moves_only_when_alpha_does():
    model = AcceptanceModel()
    prior(model, PLAN, 30, 32)
    model.observe(PLAN, [(8, 8)])
    before = model.version
    for _ in range(500):
        model.observe(PLAN, [(19, 20)])  # what it expected
    assert model.version - before <= 5
    before = model.version
    for _ in range(50):
        model.observe(PLAN, [(5, 20)])
    assert 5 < model.version - before <= 50


def test_forget_returns_toward_the_solver():
    model = AcceptanceModel()
    prior(model, PLAN, 31, 32)
    fresh = model.alpha(PLAN)
    for _ in range(50):
        model.observe(PLAN, [(0, 8)])
    low = model.alpha(PLAN)
    version = model.version
    model.forget()
    assert low < model.alpha(PLAN) < fresh
    assert model.version > version
    model.forget(share=1.0)
    assert model.alpha(PLAN) == pytest.approx(fresh)


def observed(accepted: int, times: int) -> AcceptanceModel:
    """PLAN and OTHER looked alike to the solver; PLAN drafted 8 tokens so often."""
    model = AcceptanceModel()
    for plan in (PLAN, OTHER):
        prior(model, plan, 31, 32)
    for _ in range(times):
        model.observe(PLAN, [(accepted, 8)])
    return model


def test_what_one_plan_shows_is_believed_of_the_others():
    fresh = observed(0, 0).alpha(OTHER)
    harder, as_expected = observed(4, 30), observed(8, 30)
    # 30 rejections in 150 tokens, of 5 to 6 that the solver led to expect.
    assert harder.alpha(PLAN) == pytest.approx(0.82, abs=0.02)
    assert 0.8 < harder.alpha(OTHER) < fresh - 0.04
    assert harder.lower(OTHER) < observed(0, 0).lower(OTHER)
    # No rejection in 240 tokens is a little better than expected.
    assert fresh < as_expected.alpha(OTHER) < fresh + 0.03
    # As many as expected: 1 in 23 tokens or so, in bursts of 8.
    model = observed(0, 0)
    for number in range(120):
        model.observe(PLAN, [(7 if number % 3 == 2 else 8, 8)])
    assert model.alpha(OTHER) == pytest.approx(fresh, abs=0.01)


def test_what_plans_share_is_forgotten_with_the_rest():
    fresh = observed(0, 0).alpha(OTHER)
    model = observed(4, 30)
    low, version = model.alpha(OTHER), model.version
    model.forget(share=0.9)
    assert low < model.alpha(OTHER) < fresh - 0.01
    assert model.version > version
    model.forget(share=1.0)
    assert model.alpha(OTHER) == pytest.approx(fresh)


def test_a_new_solve_is_not_told_again_what_it_has_seen():
    model = observed(4, 30)
    found = Plan.parse("skip attn:1", 4)
    model.retain({found})
    prior(model, found, 26, 32)
    alone = AcceptanceModel()
    prior(alone, found, 26, 32)
    assert model.alpha(found) == pytest.approx(alone.alpha(found))


def test_one_bad_plan_does_not_condemn_all():
    model = observed(0, 200)
    assert model.alpha(PLAN) < 0.45
    slope = observed(0, 0)._slope.value
    assert model._slope.value == pytest.approx(4.0 * slope)
    expected = (0.5 * 31 + 16 * math.exp(-slope * distance_of(0.998))) / 32
    assert model.alpha(OTHER) == pytest.approx(expected**4)


def test_a_plan_that_is_worse_than_it_looked_makes_lighter_ones_look_better():
    """All reference tokens agreed with both. The heavy one then turns out at 0.94, as its distance
    had it, and the light one, which never drafted, is believed better than that."""
    model = AcceptanceModel()
    prior(model, PLAN, 16, 16, 1 - 0.035**2 / 2)
    prior(model, OTHER, 16, 16, 1 - 0.14**2 / 2)
    generator = random.Random(3)
    before = model.alpha(PLAN)
    for _ in range(100):
        model.observe(OTHER, [(accepted_tokens(generator, 0.94, 4), 4)])
    assert model.alpha(OTHER) == pytest.approx(0.94, abs=0.02)
    assert 0.97 < model.alpha(PLAN) < before + 0.01


def test_what_plans_share_asks_for_a_new_choice():
    """Also where the plan that showed it has long been believed."""
    model = observed(6, 100)
    believed, low = model.alpha(PLAN), model.alpha(OTHER)
    version = model.version
    for _ in range(100):
        model.observe(PLAN, [(8, 8)])
    assert model.alpha(PLAN) > believed
    assert model.alpha(OTHER) > low + 0.02
    assert model.version > version


def test_retain_drops_the_rest_from_the_pool():
    model, alone = AcceptanceModel(), AcceptanceModel()
    prior(model, PLAN, 30, 32)
    prior(model, OTHER, 1, 32)
    model.retain({PLAN})
    prior(alone, PLAN, 30, 32)
    assert model.alpha(PLAN) == pytest.approx(alone.alpha(PLAN))
    assert model.alpha(OTHER) == pytest.approx(alone.alpha(OTHER))  # as of a plan never seen


@pytest.mark.parametrize(("accepted", "drafted"), [(-1, 2), (3, 2)])
def test_impossible_feedback(accepted, drafted):
    with pytest.raises(ValueError, match="accepted must lie in"):
        AcceptanceModel().observe(PLAN, [(accepted, drafted)])
