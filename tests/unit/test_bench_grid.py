# SPDX-License-Identifier: Apache-2.0
"""Who works when, on what, and what is measured again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm.bench import grid, trace
from knapspec_vllm.bench.grid import Protocol, groups, measure_cell, measure_grid, rotated
from knapspec_vllm.bench.results import Cell, Results, Round
from knapspec_vllm.bench.trace import Turns, row_times, traced, windows


class Recorder:
    """An engine without a process, which writes down its turns."""

    def __init__(self, name: str, diary: list[tuple[str, Any]]) -> None:
        self.name, self.diary, self.facts = name, diary, {"dtype": "float32"}
        self.turns = 0
        #: Of the turns of a round; then it has answered.
        self.turns_of_round = 1
        self._request: dict[str, Any] = {}

    def turn(self, request: dict[str, Any]) -> dict[str, Any] | None:
        self._request = request or self._request
        assert ("prompts" in request) == (self.turns == 0), "the request once, then: go on"
        self.diary.append((self.name, self._request["prompts"]))
        self.turns += 1
        if self.turns < self.turns_of_round:
            return None
        self.turns = 0
        rows = {"tokens": [1, 2, 3], "first": 1.0, "last": 2.0, "ttft": 0.1, "cached": False}
        window, requests = [1.0, 2], [rows] * self._request["batch"]
        one = {"seconds": 2.0, "requests": requests, "decode": window, "full": window}
        state = {"decision": str(len(self.diary)), "stats": {"rounds": 3, "by": [1, 1]}}
        return {"batches": [one], "counters": {"num_drafts": 1}, "knapspec": state}


def test_rotation() -> None:
    assert [rotated("abc", turn) for turn in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


def test_every_round_runs_all_arms_in_rotated_order_on_the_same_prompts() -> None:
    diary: list[tuple[str, Any]] = []
    engines: Any = [Recorder(name, diary) for name in "abc"]
    protocol = Protocol(rounds=3, warm_up=1, tokens=3)
    found = measure_cell(engines, Cell(2, 8), protocol, lambda number: [[number]] * 2)
    order = "".join(name for name, _ in diary)
    assert order == "cab" + "abc" + "bca" + "cab"
    assert [prompts[0][0] for _, prompts in diary] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    assert [m.arm for m in found] == ["a", "b", "c"]
    for m in found:
        assert len(m.rounds) == 3
        assert m.counters == {"num_drafts": 3}, "the warm-up is not counted"
        assert m.knapspec is not None
        assert m.knapspec["stats"] == {"rounds": 9, "by": [3, 3]}
    assert found[2].knapspec["decision"] == "10", "of the last round"


def test_turns_in_the_middle_of_a_batch() -> None:
    """One after another until all have answered; who has, leaves its turns to the others."""
    diary: list[tuple[str, Any]] = []
    engines: Any = [Recorder(name, diary) for name in "abc"]
    engines[0].turns_of_round, engines[1].turns_of_round = 3, 2
    protocol = Protocol(rounds=2, warm_up=0, tokens=3, turn=0.5)
    found = measure_cell(engines, Cell(1, 8), protocol, lambda number: [[number]])
    assert "".join(name for name, _ in diary) == "abcaba" + "bcabaa"
    assert [len(m.rounds) for m in found] == [2, 2, 2]
    assert [m.counters["num_drafts"] for m in found] == [2, 2, 2]


@pytest.mark.parametrize(("rounds", "starts"), [(5, 1), (5, 2), (7, 3), (3, 3)])
def test_starts_share_the_rounds(rounds: int, starts: int) -> None:
    protocol = Protocol(rounds=rounds, starts=starts)
    shares = [list(protocol.rounds_of(start)) for start in range(starts)]
    assert [number for share in shares for number in share] == list(range(rounds))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_groups() -> None:
    names = ["plain", "a", "b", "c"]
    assert groups(names, 9) == [names]
    assert groups(names, 3) == [["plain", "a", "b"], ["plain", "c"]]
    assert groups(names, 2) == [["plain", "a"], ["plain", "b"], ["plain", "c"]]
    assert groups(names, 1) == [["plain"], ["a"], ["b"], ["c"]]
    assert groups(["c"], 4) == [["plain", "c"]], "a later arm has a baseline of its own, too"


@pytest.mark.parametrize(("batch", "rows"), [(1, 3), (2, 4), (8, 8)])
def test_whole_batches_of_at_least_the_requests(batch: int, rows: int) -> None:
    assert Protocol(requests=3).rows(Cell(batch, 8)) == rows


def test_sampling() -> None:
    cell = Cell(1, 8, 0.5)
    equal = {"temperature": 0.5, "max_tokens": 9, "ignore_eos": True}
    assert Protocol(tokens=9).sampling(cell) == equal
    natural = Protocol(tokens=9, natural_end=True).sampling(cell)
    assert natural == {**equal, "ignore_eos": False}


def run_grid(
    results: Results, at_once: int, monkeypatch: pytest.MonkeyPatch, starts: int = 1
) -> list[str]:
    """Sessions' arms, then cells with the arms measured in them, as text."""
    events: list[str] = []

    @contextmanager
    def no_processes(engines: Sequence[Any]) -> Iterator[None]:
        events.append("+".join(engine.name for engine in engines))
        yield

    monkeypatch.setattr(grid, "running", no_processes)
    measure_grid(
        results,
        Protocol(rounds=starts, warm_up=0, tokens=3, starts=starts),
        at_once,
        lambda names: [Recorder(name, []) for name in names],  # type: ignore[misc]
        lambda cell, number: [[number]] * cell.batch,
        lambda cell, found: events.append(f"{cell.batch}:{'+'.join(m.arm for m in found)}"),
        lambda text: None,
    )
    return events


def test_grid_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("plain", "a", "b")
    results = Results({}, {}, {n: {} for n in names}, cells=[Cell(1, 8), Cell(2, 8)])
    assert run_grid(results, 9, monkeypatch) == ["plain+a+b", "1:plain+a+b", "2:plain+a+b"]
    assert results.arms["a"]["engine"] == {"dtype": "float32"}
    assert run_grid(results, 9, monkeypatch) == [], "nothing is missing"

    results.measurements = [m for m in results.measurements if m.cell.batch == 1]
    assert run_grid(results, 9, monkeypatch) == ["plain+a+b", "2:plain+a+b"]

    results.arms["c"] = {}
    assert run_grid(results, 9, monkeypatch) == ["plain+c", "1:plain+c", "2:plain+c"]
    assert [m.session for m in results.measurements] == [0] * 3 + [1] * 3 + [2] * 4
    plain, beside = results.baseline(next(m for m in results.measurements if m.arm == "c"))
    assert plain is not None
    assert (plain.session, beside) == (2, True)


def test_grid_with_room_for_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results({}, {}, {n: {} for n in ("plain", "a")}, cells=[Cell(1, 8)])
    assert run_grid(results, 1, monkeypatch) == ["plain", "1:plain", "a", "1:a"]
    assert results.baseline(results.measurements[1]) == (results.measurements[0], False)


def test_engines_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("plain", "a")
    results = Results({}, {}, {n: {} for n in names}, cells=[Cell(1, 8), Cell(2, 8)])
    session = ["plain+a", "1:plain+a", "2:plain+a"]
    assert run_grid(results, 9, monkeypatch, starts=2) == session * 2
    assert [m.session for m in results.parts("a", Cell(2, 8))] == [0, 1]
    whole = results.whole()
    assert [(m.arm, m.cell.batch) for m in whole] == [
        ("plain", 1),
        ("a", 1),
        ("plain", 2),
        ("a", 2),
    ]
    assert [len(m.rounds) for m in whole] == [2] * 4
    assert whole[1].counters == {"num_drafts": 2}
    assert whole[1].knapspec is not None
    assert whole[1].knapspec["stats"] == {"rounds": 6, "by": [2, 2]}

    del results.measurements[-1]  # interrupted in the second start
    assert run_grid(results, 9, monkeypatch, starts=2) == ["plain+a", "2:plain+a"]
    plain, beside = results.baseline(results.parts("a", Cell(2, 8))[-1])
    assert plain is not None
    assert (plain.session, beside) == (2, True)


STEPS = [(10.0, (1, 0)), (11.0, (2, 1)), (12.0, (4, 2)), (13.0, (6, 3)), (15.0, (6, 6))]


def test_windows() -> None:
    """Decode begins with the last row's first token; the batch is full until a row ends. The step
    in which a row ends is left out: it verifies a draft, and makes none."""
    assert windows(STEPS) == {"decode": [2.0, 6], "full": [1.0, 3]}
    assert windows([]) == {"decode": None, "full": None}
    assert windows([(1.0, (1,))]) == {"decode": None, "full": None}
    assert windows([(1.0, (1,)), (3.0, (4,))]) == {"decode": [2.0, 3], "full": None}
    assert windows([(1.0, (1, 1)), (2.0, (2, 2)), (3.0, (3, 3))])["full"] == [1.0, 2]
    # A row that ends with its first token.
    assert windows([(1.0, (1, 1)), (2.0, (1, 2))]) == {"decode": [1.0, 1], "full": None}


def test_steps_are_traced_while_rows_come_and_go() -> None:
    rows = [SimpleNamespace(num_generation_tokens=0, last_token_ts=0.0) for _ in range(2)]
    states = {str(i): SimpleNamespace(stats=row) for i, row in enumerate(rows)}
    script = iter(STEPS)

    class LLMEngine:
        output_processor = SimpleNamespace(request_states=states)

        def step(self) -> str:
            clock, counts = next(script)
            for row, count in zip(rows, counts, strict=True):
                if count != row.num_generation_tokens:
                    row.num_generation_tokens, row.last_token_ts = count, clock
            if counts[0] == 6:
                states.pop("0", None)  # it has ended
            return "outputs"

    engine = LLMEngine()
    with traced(engine) as steps:
        assert [engine.step() for _ in STEPS] == ["outputs"] * len(STEPS)
    assert steps == STEPS
    assert "step" not in vars(engine)
    with traced(SimpleNamespace(step=lambda: 1)) as steps:
        pass
    assert steps == []
    assert row_times(STEPS) == [(10.0, 13.0), (11.0, 15.0)]
    assert row_times([]) == []


@pytest.mark.parametrize(("seconds", "ends"), [(2.5, 2), (5.5, 2), (6.5, 1), (0.0, 0)])
def test_what_lies_between_turns_is_not_in_the_times(
    monkeypatch: pytest.MonkeyPatch, seconds: float, ends: int
) -> None:
    """A step takes 1 s, a turn 5 at least; others work for 10 meanwhile, which nobody sees."""
    now, row = [100.0], SimpleNamespace(num_generation_tokens=0, last_token_ts=0.0)
    monkeypatch.setattr(trace, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class LLMEngine:
        output_processor = SimpleNamespace(request_states={"0": SimpleNamespace(stats=row)})

        def step(self) -> None:
            now[0] += 1.0
            row.num_generation_tokens, row.last_token_ts = row.num_generation_tokens + 1, now[0]

    def others_work() -> None:
        now[0] += 10.0

    turns, engine = Turns(seconds, others_work), LLMEngine()
    for batch in range(2):
        now[0] += 5.0  # the pass that fills the cache is no part of a turn
        begin = now[0] - turns.waited
        with traced(engine, turns) as steps:
            for _ in range(13):
                engine.step()
        assert [clock - begin for clock, _ in steps] == [float(i) for i in range(1, 14)]
        assert turns.waited == 10.0 * ends * (batch + 1)
        assert now[0] - turns.waited - begin == 13.0


def request(tokens: int, last: float | None, cached: bool = False) -> dict[str, Any]:
    first = None if last is None else 1.0
    return {"tokens": [7] * tokens, "first": first, "last": last, "ttft": 0.2, "cached": cached}


def test_round_from_a_workers_answer() -> None:
    batches = [
        {"seconds": 3.0, "requests": [request(5, 3.0), request(3, 2.0)],
         "decode": [2.0, 6], "full": [1.0, 4]},
        {"seconds": 2.0, "requests": [request(5, 2.0), request(5, 2.0)],
         "decode": [1.0, 8], "full": None},
    ]  # fmt: skip
    found = Round.of(batches)
    assert (found.seconds, found.decode_seconds, found.decode_tokens) == (5.0, 3.0, 14)
    assert (found.full_seconds, found.full_tokens, found.output_tokens) == (1.0, 4, 18)
    assert found.tpot_seconds == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
    assert (found.ttft_seconds, found.exact) == (0.2, True)
    assert found.outputs[0] == found.outputs[2] != found.outputs[1]


def test_round_without_time_stamps() -> None:
    """Wall clock then, with all tokens; a cached prompt has no time to first token."""
    found = Round.of([{"seconds": 2.0, "requests": [request(8, None, cached=True)]}])
    assert (found.tokens_per_second, found.exact) == (4.0, False)
    assert found.tpot_seconds is found.ttft_seconds is found.full_tokens_per_second is None
