# SPDX-License-Identifier: Apache-2.0
"""The `knapspec` command, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.planner.types import Plan


def knapspec(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "knapspec_vllm.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )


def test_plan_prints_tables_and_draws(smollm2_path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plans.png"
    result = knapspec(
        "plan", str(smollm2_path), "--batch", "1", "2", "--context", "40", "300",
        "--num-speculative-tokens", "4", "--json", "--picture", str(picture),
        "--settings", json.dumps({"store_dir": str(tmp_path), "calibration_seconds": 3}),
        "--engine-args", json.dumps({"dtype": "float32", "enforce_eager": True}),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    tables = json.loads(result.stdout[result.stdout.index("[\n") :])
    assert [(t["batch"], t["context"]) for t in tables] == [(1, 40), (1, 300), (2, 40), (2, 300)]
    for table in tables:
        assert table["decision"]
        speedups = [row["predicted_speedup"] for row in table["frontier"]]
        assert speedups == sorted(speedups, reverse=True)
        assert len(speedups) > 3
        for row in table["frontier"]:
            plan = Plan.parse(row["plan"], 30)
            assert not plan.is_full
            assert 1 <= row["draft_length"] <= 4
            assert 0 < row["saving"] <= 0.76
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_doctor() -> None:
    model = str(random_checkpoint("LlamaForCausalLM"))
    fine = knapspec("doctor", model)
    assert fine.returncode == 0, fine.stdout
    assert "refused" not in fine.stdout
    refused = knapspec(
        "doctor", model, "--json", "--engine-args", '{"enable_lora": true, "max_lora_rank": 8}'
    )
    assert refused.returncode == 1
    checks = json.loads(refused.stdout)
    assert any(c["status"] == "refused" and "lora" in json.dumps(c).lower() for c in checks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "m", "--batch", "0"), "0 is not a positive number"),
        (("plan", "m", "--settings", "{"), "not JSON"),
        (("plan",), "model"),
        (("plna",), "invalid choice"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], words: str) -> None:
    result = knapspec(*arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_errors_are_one_line(tmp_path: Path) -> None:
    result = knapspec("plan", str(tmp_path / "no-such-model"))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr.splitlines()[-1]
    assert any(line.startswith("knapspec: ") for line in result.stderr.splitlines())
