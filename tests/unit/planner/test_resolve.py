# SPDX-License-Identifier: Apache-2.0
"""When the policy asks for another solve."""

import dataclasses
import random

from knapspec_vllm.planner.types import Batch
from tests.helpers_policy import BATCH, HALF, accepted_tokens, costs, flat, frontier, policy


def test_first_solve_only_where_it_could_pay():
    made, _ = policy()
    assert made.resolve_reason(BATCH, False) is None
    assert made.resolve_reason(BATCH, True) == "first"
    assert policy(resolve=False)[0].resolve_reason(BATCH, True) is None
    hopeless, _ = policy(model=costs(verify_us=9000.0))
    assert hopeless.resolve_reason(BATCH, True) is None
    must, _ = policy(model=costs(verify_us=9000.0), always_draft=True)
    assert must.resolve_reason(BATCH, True) == "first"


def test_curves_without_items_leave_nothing_to_solve():
    """A fit may put all the time into what every forward costs; the solver would refuse it."""
    model = dataclasses.replace(costs(), attention=flat(0.0), mlp=flat(0.0))
    made, _ = policy(model=model, always_draft=True)
    assert made.resolve_reason(BATCH, True) is None


def test_solves_that_find_nothing_become_rarer():
    made, _ = policy(frontier((HALF, 990)), resolve_rounds=10)
    rounds = []
    for _ in range(3):
        rounds.append(0)
        while made.resolve_reason(BATCH, True) != "age":
            made.choose(BATCH, 4)
            rounds[-1] += 1
        made.note_solve(1e4, found=False)
    assert rounds[1] < rounds[2]


def test_resolves_on_drift_range_and_age():
    model = costs(attention_token_us=0.02)
    made, acceptance = policy(frontier((HALF, 990)), model, resolve_rounds=100)
    made.choose(BATCH, 4)
    assert made.resolve_reason(BATCH, True) is None
    # Attention 60 us at 1000 tokens; more than double at 5000.
    assert made.resolve_reason(Batch(1, 4000), True) is None
    assert made.resolve_reason(Batch(1, 5000), True) == "range"
    for _ in range(100):
        acceptance.observe(HALF, [(2, 4)])
    assert made.resolve_reason(BATCH, True) == "drift"
    old, _ = policy(frontier((HALF, 990)), model, resolve_rounds=100)
    for _ in range(100):
        old.choose(BATCH, 4)
    assert old.resolve_reason(BATCH, True) == "age"


def left_behind():
    """A policy that declines because the text its plan was found on is over."""
    made, acceptance = policy(frontier((HALF, 30), trials=32), feedback_half_life=1024.0)
    assert made.choose(BATCH, 4).plan == HALF
    for _ in range(400):
        acceptance.observe(HALF, [(0, 4)])
    assert made.choose(BATCH, 4).plan is None
    return made


def test_plans_that_text_has_left_behind_are_solved_for_while_declining():
    """Waiting for age, a server whose traffic changed declined for 2,048 rounds."""
    made = left_behind()
    assert made.resolve_reason(BATCH, True) == "drift"
    for hits, expected in ((30, "drift"), (1, None)):  # of a solver that has seen the new text
        made.note_solve(1.0)
        made.set_frontier(frontier((HALF, hits), trials=32))
        for _ in range(20):
            made.choose(BATCH, 4)
        assert made.resolve_reason(BATCH, True) == expected


def test_a_solver_that_promises_too_much_is_asked_ever_more_rarely():
    """Sampled text is accepted less than greedy choices agree, whatever plan is found."""
    made, acceptance = policy(frontier((HALF, 30), trials=32))
    generator, solved, drafted = random.Random(1), [], 0
    for number in range(60_000):
        if made.resolve_reason(BATCH, True) is not None:
            solved.append(number)
            made.note_solve(5_000.0)  # of rounds of 1,000 us
            made.set_frontier(frontier((HALF, 30), trials=32))
        choice = made.choose(BATCH, 4)
        if choice.plan is None:
            continue
        drafted, accepted = drafted + 1, accepted_tokens(generator, 0.6, choice.draft_length)
        acceptance.observe(choice.plan, [(accepted, choice.draft_length)], BATCH.context_per_row)
    assert len(solved) <= 15
    assert solved[0] < 1000  # not of age
    assert solved[-1] - solved[-2] > 20 * (solved[1] - solved[0])
    assert drafted < 600


def test_a_solve_has_to_be_repaid():
    made, _ = policy(frontier((HALF, 990)), resolve_rounds=10)
    for _ in range(10):
        made.choose(BATCH, 4)
    assert made.resolve_reason(BATCH, True) == "age"
    made.note_solve(1e6)  # about 350 rounds of 2.8 ms
    for _ in range(20):
        made.choose(BATCH, 4)
    assert made.resolve_reason(BATCH, True) is None
    for _ in range(20_000):
        made.choose(BATCH, 4)
    assert made.resolve_reason(BATCH, True) == "age"


def test_fruitless_solves_become_rare():
    def rounds_until_due(fruitless):
        made, _ = policy(frontier((HALF, 10)), resolve_rounds=10)
        for _ in range(fruitless + 1):
            made.note_solve(1000.0)
        for number in range(100_000):
            if made.resolve_reason(BATCH, True):
                return number
            made.choose(BATCH, 4)
        raise AssertionError("never")

    assert rounds_until_due(3) >= 7 * rounds_until_due(0)
