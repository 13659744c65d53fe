# SPDX-License-Identifier: Apache-2.0
"""bench_solver.py, whose commands take too long to run whole whenever something changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_solver.py"


def test_speed_of_one_solve(tmp_path: Path) -> None:
    """Ours inside a running engine, the published one beside it."""
    command = [sys.executable, str(BENCH), "speed", "--windows", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "solver-speed.json").read_text())
    assert found["ratio"] > 1, found  # 10 where nothing else runs
