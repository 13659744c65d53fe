# SPDX-License-Identifier: Apache-2.0
"""How often calibration times a shape, and which of the times it keeps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm.calibration import profiler


@pytest.mark.parametrize(
    ("seconds", "hurry", "kept"),
    [
        # The first of a shape prepares kernels: it does not count where there is time for more.
        ([9.0, 2.0, 3.0, 4.0], math.inf, [2.0, 3.0, 4.0]),
        # Out of time there is one more than the first; a slow moment in either is not the price.
        ([9.0, 2.0], 0.0, [2.0]),
        ([2.0, 9.0], 0.0, [2.0]),
        # Time runs out in the third.
        ([9.0, 2.0, 3.0], 12.0, [2.0, 3.0]),
    ],
)
def test_times_of_a_shape(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], hurry: float, kept: list[float]
) -> None:
    clock, left = [0.0], list(seconds)

    def run() -> None:
        clock[0] += left.pop(0)

    monkeypatch.setattr(profiler, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    engine: Any = SimpleNamespace(synchronize=lambda: None)
    found = profiler._time(engine, run, hurry)
    assert [time_us / 1e6 for time_us in found] == pytest.approx(kept)
    assert not left
