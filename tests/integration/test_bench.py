# SPDX-License-Identifier: Apache-2.0
"""`knapspec bench` over real engines: one cell, plain and an arm that declines."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOKENS = 16


def knapspec(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # vLLM's own process layout, whatever the other tests need.
    hidden = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
    return subprocess.run(
        [sys.executable, "-m", "knapspec_vllm.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**{n: value for n, value in os.environ.items() if n not in hidden}, **environment},
    )


def test_one_cell(smollm2_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = (
        "bench", str(smollm2_path), "--eager", "--batch", "2", "--context", "128", "--rounds", "1",
        "--tokens", str(TOKENS), "--arms", "declining", "--engine-args", '{"dtype": "float32"}',
        "--store", str(tmp_path / "store"), "--out", str(out),
    )  # fmt: skip
    result = knapspec(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "declining" in result.stdout

    text = (out / "bench.json").read_text()
    assert str(tmp_path) not in text
    assert str(smollm2_path.parent) not in text
    values = json.loads(text)
    assert values["settings"]["model"] == smollm2_path.name
    engine = values["arms"]["plain"]["engine"]
    assert engine["process_layout"] == "own process"
    assert (engine["dtype"], engine["eager"], engine["prefix_caching"]) == ("float32", True, True)
    plain, declining = values["measurements"]
    for measurement in (plain, declining):
        (only,) = measurement["rounds"]
        assert only["exact"], "the engine's time stamps were read"
        assert only["output_tokens"] == 2 * TOKENS
        # Rows may begin a step or two apart; the tokens before the last one's first are left out.
        assert 2 * TOKENS - 6 <= only["decode_tokens"] <= 2 * TOKENS - 2
        assert 0 < only["decode_seconds"] < only["seconds"]
        assert only["full_tokens"] > 0
        assert only["ttft_seconds"] > 0
    assert plain["knapspec"] is None
    state = declining["knapspec"]
    assert state is not None, "KnapSpecProposer.snapshot() came back from the worker"
    assert state["stats"]["rounds"] >= TOKENS - 1
    assert state["stats"]["draft_tokens"] == 0

    figures = {row["arm"]: row for row in values["figures"]}
    assert figures["declining"]["identical"] == figures["declining"]["compared"] == 2
    assert 0.2 < figures["declining"]["ratio"] < 5
    with (out / "bench.csv").open(newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["plain", "declining"]
    for plot in ("speedup-heatmap", "predicted", "breakdown", "acceptance"):
        assert (out / f"{plot}.png").stat().st_size > 5_000

    again = knapspec(*command, "--resume", "--check", "0.1")
    assert again.returncode == 2
    assert "--check judges the arm knapspec" in again.stderr
    again = knapspec(*command, "--resume")
    assert again.returncode == 0
    assert "starting" not in again.stdout, "nothing was missing"


def test_turns_within_a_batch_and_several_starts(smollm2_path: Path, tmp_path: Path) -> None:
    result = knapspec(
        "bench", str(smollm2_path), "--eager", "--batch", "2", "--context", "64", "--rounds", "2",
        "--starts", "2", "--turn", "0.05", "--warm-up", "0", "--tokens", str(TOKENS),
        "--arms", "declining", "--engine-args", '{"dtype": "float32"}',
        "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out"),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    values = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert values["arms"]["plain"]["engine"]["process_layout"] == "in process"
    assert [(m["arm"], m["session"], len(m["rounds"])) for m in values["measurements"]] == [
        ("plain", 0, 1), ("declining", 0, 1), ("plain", 1, 1), ("declining", 1, 1),
    ]  # fmt: skip
    for measurement in values["measurements"]:
        (only,) = measurement["rounds"]
        assert only["exact"]
        assert 0 < only["decode_seconds"] < only["seconds"] < 60
        assert only["tpot_seconds"] * (TOKENS - 1) < only["seconds"]
    plain, declining = values["figures"]
    assert plain["ratio_by_start"] == []
    assert len(declining["ratio_by_start"]) == 2
    assert declining["identical"] == declining["compared"] == 4
