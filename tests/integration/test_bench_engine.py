# SPDX-License-Identifier: Apache-2.0
"""bench_engine.py, which otherwise only runs where a GPU is at hand, over a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knapspec_vllm.bench.checkpoints import random_checkpoint

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_engine.py"
ENGINE = {
    "enforce_eager": True,
    "max_num_seqs": 2,
    "max_model_len": 256,
    "dtype": "float32",  # without near-ties
}
SETTINGS = {"plan": "skip mlp:1", "draft_length": 2, "window_tokens": 16, "sink_tokens": 16}


@pytest.mark.parametrize("plain", [False, True])
def test_one_cell(tmp_path: Path, plain: bool) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(BENCH), str(random_checkpoint("LlamaForCausalLM"))]
    command += ["--batch", "2", "--context", "64", "--tokens", "24", "--out", str(out)]
    command += ["--engine-args", json.dumps(ENGINE), "--vocabulary", "500"]
    command += ["--plain"] if plain else ["--settings", json.dumps(SETTINGS)]
    environment = {**os.environ, "KNAPSPEC_CACHE": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    [cell] = found["cells"]
    speeds = ["plain"] if plain else ["declining", "drafting"]
    assert all(cell[name]["min"] > 0 for name in speeds)
    if not plain:
        assert cell["counted"]["knapspec"]["drafting_rounds"] > 0
        assert cell["step_ms"]["launched"] > 0
        assert cell["alike"] == {"same": 2, "of": 2, "tokens_up_to_a_difference": [24, 24]}
        assert all(solve["launched"]["total_ms"]["min"] > 0 for solve in found["solves"].values())
