# SPDX-License-Identifier: Apache-2.0
"""Predicted speedups of a batch whose rows may not all draft as far."""

from __future__ import annotations

import random

import pytest

from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.curves import Curve
from knapspec_vllm.planner.objective import throughput_tpt
from knapspec_vllm.planner.speedups import Rates
from knapspec_vllm.planner.types import Batch
from tests.helpers_policy import accepted_tokens

LENGTHS = tuple(range(1, 9))


def flat(time_us: float) -> Curve:
    return Curve((1,), (time_us,), (0.0,))


COSTS = CostModel(
    num_layers=2,
    window_tokens=64,
    steps=tuple((tokens, flat(1000.0 + 50.0 * tokens)) for tokens in (1, 3, 9)),
    fixed=flat(100.0),
    attention=flat(50.0),
    attention_window=flat(40.0),
    mlp=flat(150.0),
)


def row(room: tuple[float, ...], lengths: tuple[int, ...] = LENGTHS) -> tuple[float, ...]:
    return Rates.of(COSTS, Batch(4, 800, room), lengths).row(0.9, 300.0)


def test_rows_with_room_are_the_published_formula():
    plain_us = COSTS.step_us(Batch(4, 800), 1)
    for lengths in (LENGTHS, (5,), (3, 4)):
        want = [
            plain_us / 4 * throughput_tpt(
                4, 0.9, length, 300.0, COSTS.step_us(Batch(4, 800), 1 + length)
            )
            for length in lengths
        ]  # fmt: skip
        assert row((), lengths) == pytest.approx(want)
        assert row((1.0,) * 8, lengths) == pytest.approx(want)


def test_tokens_of_rows_with_less_room_are_those_of_a_simulation():
    """Two rows that may draft 8 tokens, one 2, one none."""
    limits = [8, 8, 2, 0]
    room = candidates(limits).room
    generator, rounds, gained = random.Random(0), 20_000, 0
    for _ in range(rounds):
        for limit in limits:
            gained += 1 + accepted_tokens(generator, 0.9, min(limit, 5))
    # The step feeds (5 + 5 + 2 + 0) / 4 drafted tokens a row and one more.
    plain_us, round_us = (COSTS.step_us(Batch(4, 800), n) for n in (1, 4))
    want = gained / (4 * rounds) * plain_us / (5 * 300.0 + round_us)
    assert row(room)[4] == pytest.approx(want, rel=0.01)


def test_nobody_gains_beyond_the_last_room():
    longer = row((1.0, 0.5))
    plain_us = COSTS.step_us(Batch(4, 800), 1)
    for length in (2, 3, 8):
        round_us = length * 300.0 + COSTS.step_us(Batch(4, 800), 2.5)
        want = (1.0 + 0.9 + 0.5 * 0.81) * plain_us / round_us
        assert longer[length - 1] == pytest.approx(want)


def candidates(limits: list[int]) -> Candidates:
    rows = list(range(len(limits)))
    return Candidates(rows, [str(i) for i in rows], rows, rows, limits, [99] * len(rows))


@pytest.mark.parametrize(
    ("limits", "room"),
    [
        ([8], ()),
        ([3, 3], ()),
        ([0, 0], ()),
        ([0, 2], (0.5, 0.5)),
        ([8, 1, 2, 2], (1.0, 0.75, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25)),
    ],
)
def test_room(limits: list[int], room: tuple[float, ...]):
    assert candidates(limits).room == room


def test_tokens_that_are_kept_and_steps_of_rows_without_room():
    """A step in which some row feeds two tokens costs no less than if all did."""
    batch, shares = Batch(4, 800, (0.5, 0.25)), (0.5, 0.75)
    rates = Rates.of(COSTS, batch, (1, 2), kept=0.8, verify=1.5)
    for length, (gained, found) in enumerate(
        zip((1 + 0.8 * 0.9 * 0.5, 1 + 0.8 * (0.9 * 0.5 + 0.81 * 0.25)), rates.row(0.9, 300.0),
            strict=True), 1
    ):  # fmt: skip
        verify_us = 1.5 * COSTS.step_us(batch, 1 + shares[length - 1])
        want = gained * COSTS.step_us(batch, 1) / (length * 300.0 + verify_us)
        assert found == pytest.approx(want)
    assert COSTS.step_us(batch, 4.5) == pytest.approx(1000.0 + 50.0 * 4.5)
    assert COSTS.step_us(batch, 1.25) == COSTS.step_us(batch, 2) == COSTS.step_us(batch, 3)
