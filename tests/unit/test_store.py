# SPDX-License-Identifier: Apache-2.0
"""The calibration store: reused when it fits, ignored with a warning when it does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from knapspec_vllm.calibration.store import Calibration, CalibrationStore
from knapspec_vllm.planner.costs import CostModel, CostSample
from knapspec_vllm.planner.types import Frontier, Mode, Plan, PlanEstimate

FINGERPRINT = {"hardware": {"device": "a"}, "model": "m", "versions": {"vllm": "0.32.0"}}


def calibration() -> Calibration:
    samples = [CostSample("step", 1, k, 100, 1000.0 + 50 * k) for k in (1, 2, 5)]
    samples += [
        CostSample("draft_full", 1, 1, 100, 900.0),
        CostSample("draft_no_attention", 1, 1, 100, 600.0),
        CostSample("draft_empty", 1, 1, 100, 200.0),
    ]
    plan = Plan((Mode.FULL, Mode.SKIP, Mode.WINDOW, Mode.FULL))
    frontier = Frontier((PlanEstimate(plan, 0.97, 14, 16),), 100, 1, "solved")
    return Calibration(CostModel.fit(samples, 2, 640), frontier, "kernel", "screened")


def test_round_trip(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "new" / "folder", FINGERPRINT)
    assert store.load() is None
    store.save(calibration())
    assert store.load() == calibration()
    assert [path.suffix for path in store.path.parent.iterdir()] == [".json"]


def test_every_fingerprint_has_a_file_of_its_own(tmp_path: Path) -> None:
    one = CalibrationStore(tmp_path, FINGERPRINT)
    other = CalibrationStore(tmp_path, {**FINGERPRINT, "model": "n"})
    one.save(calibration())
    assert other.load() is None


def _truncated(text: str) -> str:
    return text[: len(text) // 2]


def _foreign(text: str) -> str:
    return text.replace('"device": "a"', '"device": "b"')


def _other_schema(text: str) -> str:
    return json.dumps({**json.loads(text), "schema": 999})


def _broken_costs(text: str) -> str:
    entry = json.loads(text)
    entry["costs"]["steps"] = "fast"
    return json.dumps(entry)


def _broken_frontier(text: str) -> str:
    entry = json.loads(text)
    entry["frontier"]["estimates"] = [{"plan": "skip attn:77"}]
    return json.dumps(entry)


def _unknown_path(text: str) -> str:
    return json.dumps({**json.loads(text), "attention_path": "magic"})


def _unknown_head(text: str) -> str:
    return json.dumps({**json.loads(text), "head": "magic"})


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _foreign,
        _other_schema,
        _broken_costs,
        _broken_frontier,
        _unknown_path,
        _unknown_head,
        lambda _: "[1, 2]",
    ],
)
def test_damaged_or_foreign_files_are_ignored_with_a_warning(
    tmp_path: Path, damage, caplog: pytest.LogCaptureFixture
) -> None:
    store = CalibrationStore(tmp_path, FINGERPRINT)
    store.save(calibration())
    store.path.write_text(damage(store.path.read_text()))
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        assert store.load() is None
    assert str(store.path) in caplog.text
    store.save(calibration())
    assert store.load() == calibration()


def test_unreadable_and_unwritable_places_do_not_stop_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    store = CalibrationStore(blocked / "store", FINGERPRINT)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        store.save(calibration())
        assert store.load() is None
    assert "could not store" in caplog.text
