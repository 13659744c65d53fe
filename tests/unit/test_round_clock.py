# SPDX-License-Identifier: Apache-2.0
"""Which rounds count, and which of those teach what rounds take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm.draft import round_clock
from knapspec_vllm.draft.round_clock import RoundClock
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner.types import Batch, Choice, Plan

BATCH = Batch(1, 100)
CHOICE = Choice(None, 0, 1.0, "test", "no gain", round_us=10_000.0)


class Driver:
    """One row that declines: a proposal of 1 ms, then a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.taught = 0.0, []
        monkeypatch.setattr(round_clock, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.stats = Stats()
        self.clock = RoundClock(self.stats)
        policy = SimpleNamespace(
            observe_step=lambda batch, tokens, time_us: self.taught.append(round(time_us)),
            plain_us=lambda batch: 10_000.0,
        )
        self.planning: Any = SimpleNamespace(policy=policy)

    def round(
        self, step_ms: float, req_ids: tuple[str, ...] = ("a",), unusual: bool = False
    ) -> None:
        rows = Rows(list(req_ids))
        self.clock.entered()
        self.clock.verified(self.planning, rows, 1, [[5]])
        self.now += 0.001
        self.clock.ended(BATCH, rows, CHOICE, [0], 0, 0.0, 0.0, unusual)
        self.now += step_ms / 1e3


class Rows:
    def __init__(self, req_ids: list[str]) -> None:
        self.req_ids, self.index = req_ids, [0]

    def __len__(self) -> int:
        return 1


def test_a_round_is_a_proposal_and_the_step_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    for step_ms in (9.0, 11.0, 9.0):
        driver.round(step_ms)
    assert driver.taught == [10_000, 12_000]
    assert driver.stats.measured_rounds == 2


def test_declining_is_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a plain step was believed to take: after a start that was 0.86x in 8 rounds."""
    driver = Driver(monkeypatch)
    for _ in range(4):
        driver.round(19.0)
    assert driver.stats.realised_round_us == pytest.approx(60_000)
    assert driver.stats.realised_plain_us == pytest.approx(60_000)


def test_other_rows_are_another_round(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    driver.round(9.0)
    driver.round(9.0, ("b",))
    assert driver.taught == []


def test_a_solve_teaches_nothing_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    driver.round(90.0, unusual=True)
    driver.round(9.0)
    driver.round(9.0)
    assert driver.taught == [10_000]
    assert driver.stats.measured_rounds == 2
    assert driver.stats.realised_round_us == pytest.approx(10_000)


def test_a_pause_is_no_round_but_slow_rounds_are(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    for step_ms in (9.0, 60_000.0, 9.0, 9.0):
        driver.round(step_ms)
    assert driver.taught == [10_000, 10_000]
    assert driver.stats.realised_round_us == pytest.approx(20_000)
    # Curves that are off by that much have to be learned all the same.
    slow = Driver(monkeypatch)
    for _ in range(9):
        slow.round(500.0)
    assert slow.taught == [501_000] * 2


def test_rows_of_different_drafts_teach_by_what_they_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two rows opted out: in mixed traffic hardly a round has drafts of one length."""
    driver = Driver(monkeypatch)
    fed: list[float] = []
    driver.planning.policy.observe_step = lambda batch, tokens, time_us: fed.append(tokens)
    ran: list[int] = []
    driver.planning.policy.observe_draft = lambda batch, plan, forwards, us: ran.append(forwards)
    rows: Any = Rows(["a", "b"])
    rows.index = [0, 1]
    plan = Plan.parse("skip mlp:1", 4)
    choice = Choice(plan, 3, 1.5, "test", round_us=20_000.0)
    for drafts in ([3, 0], [3, 3], [2, 3]):
        driver.clock.entered()
        driver.clock.ended(Batch(2, 100), rows, choice, drafts, 4, 1000.0, 0.0, False)
        driver.now += 0.02
        driver.clock.entered()
        driver.clock.verified(driver.planning, rows, 2 + sum(drafts), [[5], [5]])
    assert fed == [2.5, 4.0, 3.5]
    assert ran == [4, 4, 4]  # what ran, not what was proposed: a GPU does not look whether to stop


def test_rounds_that_were_not_looked_at_count_and_teach_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(monkeypatch)
    driver.round(9.0)
    driver.round(9.0)
    for _ in range(6):
        driver.clock.entered()
        driver.clock.rested()
        driver.now += 0.012
    driver.round(9.0)
    assert driver.taught == [10_000, 12_000]
    stats = driver.stats
    assert stats.measured_rounds == 8
    assert stats.phase_us["own"] == pytest.approx(2 * 1000.0), "of those that were looked at"
    assert stats.realised_round_us == stats.realised_plain_us == pytest.approx(92_000.0)
    assert stats.predicted_round_us == stats.predicted_plain_us == pytest.approx(80_000.0)


def test_a_pause_among_rounds_that_were_not_looked_at_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(monkeypatch)
    driver.clock.entered()
    driver.clock.rested()  # nothing before it: nothing to count
    driver.round(9.0)
    for gap_s in (60.0, 0.009, 0.009):
        driver.clock.entered()
        driver.clock.rested()
        driver.now += gap_s
    assert driver.stats.measured_rounds == 2
