# SPDX-License-Identifier: Apache-2.0
"""A decision to decline holds for some rounds of the same kind of batch, and for no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knapspec_vllm.draft.observed import Verified
from knapspec_vllm.draft.planning import Planning
from knapspec_vllm.planner.types import Batch, Choice
from tests.helpers_planning import planning
from tests.helpers_policy import HALF, LIGHT, frontier

ALONE = Batch(1, 1000)


def rounds(made: Planning, number: int, batch: Batch = ALONE) -> list[Choice]:
    return [made.choose(batch, 4, lambda: None) for _ in range(number)]


def test_looks_again_every_ninth_round() -> None:
    made, asked = planning(hits=300)
    found = rounds(made, 27)
    assert {choice.code for choice in found} == {"no gain"}
    assert len(asked) == 3
    assert made._stats.declined_rounds["no gain"] == 27
    assert made._stats.rounds == 27


def served(made: Planning, number: int, rows: list[str]) -> list[bool]:
    """Rounds as a proposer asks for them; which of them were not even looked at."""
    rested = []
    for _ in range(number):
        rested.append(made.rests(rows, True))
        if not rested[-1]:
            made.choose(Batch(len(rows), 1000 * len(rows)), 4, lambda: None)
    return rested


def test_rests_between_looks_behind_a_round_that_is_measured() -> None:
    made, asked = planning(hits=300)
    rested = served(made, 27, ["a"])
    assert rested == ([False] * 2 + [True] * 7) * 3
    assert len(asked) == 3
    assert made._stats.declined_rounds["no gain"] == made._stats.rounds == 27


@pytest.mark.parametrize("others", [["b"], ["a", "b"], []])
def test_never_rests_over_other_rows(others: list[str]) -> None:
    made, _ = planning(hits=300)
    assert served(made, 4, ["a"]) == [False, False, True, True]
    assert made.rests(others, True) is False
    assert made.rests(["a"], True) is False


@pytest.mark.parametrize("before", ["opted out", "forced", "prefill"])
def test_never_rests_on_a_decision_that_was_not_made(before: str) -> None:
    made, _ = planning(hits=300)
    served(made, 4, ["a"])
    if before == "opted out":
        made.choose(ALONE, 0, lambda: None, True)
    elif before == "forced":
        made.force(HALF, 2)
        assert made.choose(ALONE, 4, lambda: None).draft_length == 2
    assert made.rests(["a"], before != "prefill") is False


def test_never_rests_while_it_drafts_or_a_solve_is_asked_for() -> None:
    made, _ = planning(hits=1000)
    assert not any(served(made, 20, ["a"]))
    made, _ = planning(hits=300)
    served(made, 3, ["a"])
    made.request_solve()
    assert made.rests(["a"], True) is False


def test_what_never_drafts_is_looked_at_once() -> None:
    made, asked = planning(hits=1000, draft_length=0)
    assert served(made, 40, ["a"]) == [False] + [True] * 39
    assert served(made, 2, ["b"]) == [False, True]
    assert not asked
    assert made._stats.declined_rounds["set to zero"] == made._stats.rounds == 42
    made.force(HALF, 2)
    assert made.rests(["b"], True) is False
    assert made.choose(ALONE, 4, lambda: None).draft_length == 2


def test_every_round_counts_for_the_policy() -> None:
    """What it learned is doubted after so many declined rounds, asked or not."""
    made, _ = planning(hits=300, resolve_rounds=20)
    forgotten = []
    made.acceptance.forget = lambda: forgotten.append(1)  # type: ignore[method-assign]
    rounds(made, 41)
    assert len(forgotten) == 2
    served(made, 40, ["a"])
    assert len(forgotten) == 4


@pytest.mark.parametrize("other", [Batch(2, 1000), Batch(1, 1200)])
def test_another_batch_is_looked_at_at_once(other: Batch) -> None:
    made, asked = planning(hits=300)
    rounds(made, 2)
    rounds(made, 1, other)
    assert asked == [Batch(1, 1000), other]
    rounds(made, 1)
    assert len(asked) == 3


def test_less_room_is_looked_at_at_once() -> None:
    made, asked = planning(hits=300)
    rounds(made, 1)
    made.choose(Batch(1, 1000), 2, lambda: None)
    assert len(asked) == 2


def test_a_solve_that_was_asked_for_is_not_kept_waiting() -> None:
    made, asked = planning(hits=300)
    rounds(made, 2)
    made.request_solve()
    rounds(made, 1)
    assert len(asked) == 2


def test_a_solve_that_finds_nothing_takes_no_plans_away() -> None:
    stored = []
    made, _ = planning(hits=1000)
    made.solving._on_frontier = stored.append
    assert made.policy is not None
    before = made.policy.frontier
    assert before is not None
    found = frontier((LIGHT, 900)).estimates
    for estimates, kept in (((), before.estimates), (found, found)):
        solve = SimpleNamespace(
            ready=lambda: True, result=lambda e=estimates: e, time_us=1e5, host_us=1e5
        )
        pending: Any = SimpleNamespace(solve=solve, batch=ALONE, described="test")
        made.solving._pending = pending
        made.solving.collect(made.policy)
        assert made.solving._pending is None
        assert made.policy.frontier is not None
        assert made.policy.frontier.estimates == kept
    assert len(stored) == 1
    assert made._stats.solves == 2


@pytest.mark.parametrize("alone", [True, False])
def test_out_of_memory_ends_solving_and_not_the_server(
    alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With several ranks the others wait in a collective: then it has to end."""
    made, _ = planning(hits=1000, resolve=True)
    tries = []

    def solve(*_: Any) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("no room")

    made.solving._solve = solve  # type: ignore[method-assign, assignment]
    ranks: Any = SimpleNamespace(leads=True, alone=alone, share=lambda value, seen=None: value)
    made.solving._agreement = ranks
    references: Any = SimpleNamespace(tokens=[1])
    made.request_solve()
    if not alone:
        with pytest.raises(torch.OutOfMemoryError):
            made.choose(ALONE, 4, lambda: references)
        return
    for _ in range(3):
        assert made.choose(ALONE, 4, lambda: references).plan == HALF
        made.request_solve()
    assert tries == [1]
    assert "solves no more" in caplog.text


def test_drafting_is_decided_every_round() -> None:
    made, asked = planning(hits=1000)
    found = rounds(made, 5)
    assert all(choice.plan == HALF for choice in found)
    assert len(asked) == 5
    assert made._stats.plan_changes == {"start": 1}


def test_acceptance_is_learned_for_the_batch_that_drafted() -> None:
    """Rows of 300 and 20,000 tokens, decided on together: neither length is asked for."""
    made, _ = planning(hits=1000, feedback_half_life=1e9)
    batch = Batch(2, 20_300)
    assert made.choose(batch, 4, lambda: None).plan == HALF
    for _ in range(100):
        rows = [Verified(0, 4, context) for context in (300, 20_000)]
        made.feedback(HALF, rows, batch.context_per_row)
    # 200 rejections; 64 borrowed ones would leave 0.94.
    assert made.acceptance.alpha(HALF, batch.context_per_row) < 0.9


def test_changes_of_plan_are_told_apart() -> None:
    made, _ = planning(hits=1000)
    for plan in (HALF, HALF, LIGHT, None, None, HALF):
        made._note(Choice(plan, 3 if plan else 0, 1.2, "test", "" if plan else "no gain"), ALONE)
    assert made._stats.plan_changes == {"start": 2, "plan": 1, "stop": 1}
