# SPDX-License-Identifier: Apache-2.0
"""Factors by hand: fallbacks, clipping, forgetting, and when the policy has to look again."""

import pytest

from knapspec_vllm.planner.corrections import Corrections
from knapspec_vllm.planner.types import Batch

ONE, LONG, MANY = Batch(1, 300), Batch(1, 5000), Batch(8, 2400)


def test_nothing_learned_changes_nothing():
    made = Corrections()
    assert [made.factor(part, ONE) for part in ("plain", "verify", "draft")] == [1.0] * 3
    assert made.version == 0


def test_each_part_and_kind_of_batch_has_its_own():
    made = Corrections()
    made.observe("plain", ONE, 100.0, 110.0)
    made.observe("verify", ONE, 100.0, 150.0)
    made.observe("plain", MANY, 100.0, 80.0)
    assert made.factor("plain", ONE) == pytest.approx(1.1)
    assert made.factor("plain", Batch(1, 310)) == pytest.approx(1.1)
    assert made.factor("plain", MANY) == pytest.approx(0.8)
    assert made.factor("verify", ONE) == pytest.approx(1.5)
    assert made.factor("draft", ONE) == 1.0


def test_falls_back_to_all_batches_and_verify_to_plain():
    made = Corrections()
    made.observe("plain", ONE, 100.0, 120.0)
    assert made.factor("plain", LONG) == pytest.approx(1.2)
    assert made.factor("verify", LONG) == pytest.approx(1.2)
    assert made.factor("draft", LONG) == 1.0
    assert made.count("plain", LONG) == 0
    assert made.count("plain", ONE) == 1


def test_first_rounds_are_averaged_later_ones_forget():
    made = Corrections()
    for time_us in (100.0, 121.0):
        made.observe("draft", ONE, 100.0, time_us)
    assert made.factor("draft", ONE) == pytest.approx(1.1)  # geometric mean
    for _ in range(300):
        made.observe("draft", ONE, 100.0, 90.0)
    assert made.factor("draft", ONE) == pytest.approx(0.9, rel=1e-3)


def test_outliers_count_as_a_factor_of_two():
    made = Corrections()
    made.observe("plain", ONE, 100.0, 1e9)
    assert made.factor("plain", ONE) == pytest.approx(2.0)
    made.observe("plain", MANY, 100.0, 0.1)
    assert made.factor("plain", MANY) == pytest.approx(0.5)


def test_a_factor_beyond_the_clip_is_learned():
    """Twice a round further than what is known, so that four times as long takes two rounds."""
    made = Corrections()
    for _ in range(100):
        made.observe("verify", ONE, 100.0, 500.0)
    assert made.factor("verify", ONE) == pytest.approx(5.0, rel=0.1)


def test_version_grows_only_when_a_factor_moves():
    made = Corrections()
    made.observe("plain", ONE, 100.0, 110.0)
    version = made.version
    assert version > 0
    made.observe("plain", ONE, 100.0, 110.0)
    assert made.version == version
    made.observe("plain", ONE, 100.0, 150.0)
    assert made.version > version


def test_disabled_learns_nothing():
    made = Corrections(enabled=False)
    made.observe("plain", ONE, 100.0, 150.0)
    assert made.factor("plain", ONE) == 1.0
    assert made.version == 0
