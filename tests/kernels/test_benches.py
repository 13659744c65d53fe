# SPDX-License-Identifier: Apache-2.0
"""Every kernel bench runs where there is no GPU: at toy sizes under the interpreter, saying so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

BENCHES = sorted((Path(__file__).parents[1] / "benchmarks" / "kernels").glob("bench_*.py"))


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem)
def test_runs(bench: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(bench), "--budget-ms", "1", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["cases"]
    assert all(case["ms"]["median"] > 0 for case in found["cases"])
    assert found["provenance"]["toy"] == ("No GPU: toy sizes" in done.stdout)
