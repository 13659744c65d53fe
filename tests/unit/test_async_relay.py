# SPDX-License-Identifier: Apache-2.0
"""Decisions that travel between the scheduler's process and the workers'."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm.draft.async_drafting import AsyncDrafting
from knapspec_vllm.draft.async_relay import RelayedAsyncPlanning, RelayedPlanning, RelayHost
from knapspec_vllm.draft.async_rounds import (
    REPORT,
    ROUND,
    AsyncRound,
    Decision,
    Marks,
    Report,
    Timing,
)
from knapspec_vllm.draft.references import Passages, Wanted
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner.types import Batch, Choice, Plan
from tests.helpers_planning import planning as declining

PLAN = Plan.parse("skip attn:1 mlp:2", 4)
CHOICE = Choice(PLAN, 3, 1.5, "predicted speedup 1.50", round_us=900.0)
WANTED = Wanted(number=8, most_rows=2, least_tokens=4, latest_start=2048)


def report(choice: Choice | None = CHOICE, **values: Any) -> Report:
    fields: dict[str, Any] = {
        "wants_passages": False, "solving": False, "settled": True, "own_us": 5.0, "captured": {},
        "times": Timing(700.0, 200.0),
    }  # fmt: skip
    return Report(choice, **{**fields, **values})


def nothing() -> None:
    raise AssertionError("nobody has asked for them")


def ask(planning: RelayedPlanning, rows: int = 2, most: int = 5) -> Choice:
    return planning.choose(Batch(rows, 100 * rows), most, nothing)


def test_the_last_answer_counts() -> None:
    planning = RelayedPlanning(WANTED)
    assert ask(planning).draft_length == 0
    planning.answered(report(), rows=2)
    assert ask(planning) == CHOICE
    planning.answered(report(None), rows=0)  # a step in which nobody was to be asked
    assert ask(planning) == CHOICE
    asked = [arguments for name, arguments in planning.take_calls() if name == "choose"]
    assert asked == [(Batch(2, 200), 5, None, False)] * 3
    assert planning.take_calls() == ()


@pytest.mark.parametrize(("rows", "most", "length"), [(3, 5, 3), (2, 2, 2)])
def test_answers_to_other_questions_predict_nothing(rows: int, most: int, length: int) -> None:
    planning = RelayedPlanning(WANTED)
    planning.answered(report(), rows=2)
    choice = ask(planning, rows, most)
    assert (choice.plan, choice.draft_length, choice.round_us) == (PLAN, length, 0.0)


def test_no_room_is_no_draft() -> None:
    planning = RelayedPlanning(WANTED)
    planning.answered(report(), rows=2)
    assert ask(planning, most=0).plan is None
    declined = Choice(None, 0, 1.0, "no gain", "no gain", 800.0)
    planning.answered(report(declined), rows=2)
    assert ask(planning, most=0) == declined


@pytest.mark.parametrize("code", ["no room", "opted out"])
def test_rows_about_to_end_leave_the_answer(code: str) -> None:
    """Or the next batch would begin with two plain steps."""
    planning = RelayedPlanning(WANTED)
    planning.answered(report(), rows=2)
    planning.answered(report(Choice(None, 0, 1.0, code, code)), rows=2)
    assert ask(planning) == CHOICE


def test_tokens_travel_when_a_solve_is_due() -> None:
    planning, passages = RelayedPlanning(WANTED), Passages(("a",), (3,), (7, 8, 9))
    planning.answered(report(wants_passages=True), rows=1)
    planning.choose(Batch(1, 100), 5, lambda: passages)
    planning.answered(report(), rows=1)
    ask(planning, rows=1)
    sent = [arguments[2] for _, arguments in planning.take_calls()]
    assert sent == [passages, None]


def decision() -> Decision:
    return Decision(CHOICE, Batch(1, 20), {"a": 3}, longest=24, solving=False, own_us=1.0)


def test_what_a_step_carries() -> None:
    sent = AsyncRound(4, decision(), decision(), calls=(("choose", (Batch(1, 20), 5)),))
    got = pickle.loads(pickle.dumps(sent))
    assert (got.number, got.decides, got.calls) == (4, sent.decides, sent.calls)
    assert got.verifies is None  # stays with the scheduler
    assert sent.verifies is not None
    large = Plan.parse("skip attn:1-80", 90)
    assert len(pickle.dumps(large)) < 300
    assert pickle.loads(pickle.dumps(large)) == large


@pytest.fixture
def planning() -> RelayedAsyncPlanning:
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=5),
        additional_config={"knapspec": {}},
        device_config=SimpleNamespace(device_type="cpu"),
        scheduler_config=SimpleNamespace(
            max_num_scheduled_tokens=None, max_num_batched_tokens=256, async_scheduling=True
        ),
    )
    return RelayedAsyncPlanning(RelayHost(config, max_model_len=64))


def request(req_id: str, tokens: int, max_tokens: int) -> SimpleNamespace:
    ids = list(range(tokens))
    return SimpleNamespace(
        request_id=req_id, all_token_ids=ids, num_tokens=tokens, num_prompt_tokens=tokens,
        num_computed_tokens=tokens - 1, num_output_placeholders=0, num_output_tokens=0,
        max_tokens=max_tokens, use_structured_output=False, resumable=False,
        sampling_params=SimpleNamespace(extra_args=None, max_tokens=max_tokens),
        is_finished=lambda: False,
    )  # fmt: skip


def test_a_step_and_its_answer(planning: RelayedAsyncPlanning) -> None:
    scheduler = SimpleNamespace(requests={"a": request("a", 20, 9), "b": request("b", 30, 2)})
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 1, "b": 1}, scheduled_spec_decode_tokens={},
        total_num_scheduled_tokens=2,
    )  # fmt: skip
    planning.decide(scheduler, step)
    sent: AsyncRound = pickle.loads(pickle.dumps(getattr(step, ROUND)))
    assert sent.calls is not None
    calls = dict(sent.calls)
    assert calls["choose"][:2] == (Batch(2, 50, calls["choose"][0].room), 5)
    (counts,) = calls["count"]
    assert counts.clipped_rows == {"max_tokens": 1}  # b, which ends with the step after it
    worker = Stats(clipped_rows=Counter(request=2))
    worker.add_counts(counts)
    assert worker.clipped_rows == {"request": 2, "max_tokens": 1}

    output = SimpleNamespace(req_id_to_index={"a": 0, "b": 1}, sampled_token_ids=[[5], [6]])
    setattr(output, REPORT, report(solving=True, captured={4: (1, 2)}))
    planning.learn(scheduler, step, output)
    decided = getattr(step, ROUND).decides
    assert (decided.solving, decided.settled, decided.draft_us) == (True, True, 0.0)

    again = SimpleNamespace(**vars(step) | {"num_scheduled_tokens": {"a": 1}})
    planning.decide(scheduler, again)
    found: AsyncRound = getattr(again, ROUND)
    assert found.decides is not None
    assert found.decides.limits == {"a": 3}
    assert again.num_spec_tokens_to_schedule == 3


class Output:
    """Stands for vLLM's output of a step that is still computed."""

    def get_output(self) -> SimpleNamespace:
        return SimpleNamespace()


def asked(drafting: AsyncDrafting, *arguments: Any) -> Report | None:
    """A step that brings one question, as vLLM's runner ends it."""
    drafting._asked = AsyncRound(1, None, calls=(("choose", arguments),)), Marks(None, 1.0, 2.0)
    got: Report | None = getattr(drafting.reported(Output()).get_output(), REPORT, None)
    return got


@pytest.mark.parametrize("leads", [True, False])
def test_the_first_rank_answers(leads: bool) -> None:
    drafting = worker(leads, resolve=False)
    found = asked(drafting, Batch(1, 1000), 4, None, False)
    assert (found is not None) == leads
    assert found is None or found.times == Timing(None, 1e6)
    assert drafting.stats.rounds == 1, "every rank decides"
    output = Output()
    assert drafting.reported(output) is output, "there is nothing to answer"
    assert "get_output" not in vars(output)


def test_a_solve_is_due_while_the_planner_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens come in a step for which the decision to decline would hold."""
    drafting = worker(True, resolve=True)
    planning, solved = drafting.planner, []
    monkeypatch.setattr(planning.solving, "_reason", lambda *_: "range")
    monkeypatch.setattr(drafting, "references", lambda passages: passages)

    def solve(policy: Any, batch: Batch, references: Any) -> SimpleNamespace:
        solved.append(references)
        return SimpleNamespace(ready=lambda: False)

    monkeypatch.setattr(planning.solving, "_solve", solve)
    batch, passages = Batch(1, 1000), Passages(("a",), (3,), (7, 8, 9))
    for _ in range(2):  # the second is held
        found = asked(drafting, batch, 4, None, False)
        assert found is not None
        assert found.choice is not None
        assert (found.choice.code, found.wants_passages) == ("no gain", True)
    found = asked(drafting, batch, 4, passages, False)
    assert solved == [passages]
    assert found is not None
    assert (found.wants_passages, found.solving) == (False, True)


def worker(leads: bool, **settings: Any) -> AsyncDrafting:
    """With a planner that declines."""
    made, _ = declining(hits=300, **settings)
    proposer: Any = SimpleNamespace(
        num_speculative_tokens=4, stats=made._stats, verify_graphs=SimpleNamespace(shapes={}),
        planner=made, engine=SimpleNamespace(paged_kv=(1,)), agreement=SimpleNamespace(leads=leads),
    )  # fmt: skip
    return AsyncDrafting(proposer, None)
