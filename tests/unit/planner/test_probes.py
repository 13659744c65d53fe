# SPDX-License-Identifier: Apache-2.0
"""A plan that looks worse than it is gets another look, at a bounded price."""

import pytest

from knapspec_vllm.planner.corrections import kind_of
from knapspec_vllm.planner.probes import Probes
from tests.helpers_policy import BATCH, HALF, frontier, policy

ROUNDS = 2000


def play(hits, trials, true_alpha, rounds=ROUNDS, **settings):
    """Codes of the rounds of a server whose drafts are accepted at `true_alpha`."""
    settings = {"prior_weight": 8.0, "min_speedup": 1.1, **settings}
    made, acceptance = policy(frontier((HALF, hits), trials=trials), most=4, **settings)
    codes, debt = [], 0.0
    for _ in range(rounds):
        choice = made.choose(BATCH, 4)
        codes.append(choice.code or "drafts")
        if choice.plan is not None:
            debt += true_alpha
            accepted = 0
            # As many as true_alpha makes on average, without chance.
            while accepted < choice.draft_length and debt >= 0.5:
                accepted, debt = accepted + 1, debt - (1 - true_alpha)
            if accepted < choice.draft_length:
                debt = 0.0
            acceptance.observe(choice.plan, [(accepted, choice.draft_length)])
    return codes


def test_a_plan_better_than_believed_is_found():
    codes = play(hits=12, trials=16, true_alpha=1.0)
    assert codes[0] == "no gain"
    assert codes[-1] == "drafts"
    assert codes.index("drafts") < 200
    assert 0 < codes.count("probing") <= 12


def test_a_plan_as_bad_as_believed_costs_little():
    codes = play(hits=12, trials=16, true_alpha=0.0)
    assert "drafts" not in codes
    assert 1 <= codes.count("probing") <= ROUNDS * 0.02


def test_a_hopeless_plan_is_not_tried():
    assert set(play(hits=100, trials=1000, true_alpha=0.0)) == {"no gain"}


def test_first_probes_come_soon_and_not_at_once():
    codes = play(hits=12, trials=16, true_alpha=0.0, rounds=100)
    first = codes.index("probing")
    assert first == 15
    assert codes[first + 1 : first + 16] == ["no gain"] * 15


@pytest.mark.parametrize(("lost_rounds", "wait"), [(0.1, 16), (5.0, 250)])
def test_first_probes_cost_a_fiftieth_of_the_time(lost_rounds, wait):
    probes, kind = Probes(1.1), kind_of(BATCH)
    due = []
    for _ in range(3 * wait):
        probes.note_round(declined=True)
        due.append(probes._due(kind, lost_rounds))
    assert [number for number, is_due in enumerate(due, 1) if is_due] == [wait, 2 * wait, 3 * wait]


def test_other_plans_are_looked_at_anew():
    """Hope is not looked for in every round, but for plans that it was not looked for."""
    made, _ = policy(frontier((HALF, 100), trials=1000), most=4, prior_weight=8.0, min_speedup=1.1)
    assert {made.choose(BATCH, 4).code for _ in range(40)} == {"no gain"}
    made.set_frontier(frontier((HALF, 12), trials=16))
    assert "probing" in {made.choose(BATCH, 4).code for _ in range(20)}


def test_settings_that_forbid_drafting_forbid_probes():
    assert set(play(hits=12, trials=16, true_alpha=1.0, draft_length=0)) == {"set to zero"}


def test_a_probe_is_not_a_decision():
    """What a start needs is asked of the round after it as of any other."""
    made, _ = policy(frontier((HALF, 12), trials=16), most=4, prior_weight=8.0, min_speedup=1.1)
    codes = [made.choose(BATCH, 4).code for _ in range(17)]
    assert codes[15] == "probing"
    assert not made._speculating
    assert codes[16] == "no gain"
