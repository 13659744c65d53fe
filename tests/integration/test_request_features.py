# SPDX-License-Identifier: Apache-2.0
"""Features of single requests, all in one batch: the same output with and without KnapSpec."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from engines import engine, proposer_of
from features import OPTIONS, PLAN, assert_same_answers, run_features

pytestmark = pytest.mark.slow

#: Writes (answers, what the worker has counted); in a process of its own, which can be forked.
AHEAD = """
import json, pickle, sys
from pathlib import Path
import vllm.v1.executor.multiproc_executor, vllm.v1.worker.cpu_worker
from ahead_on_cpu import schedule_ahead
from engines import engine
from features import run_features
from knapspec_vllm.bench.inspection import knapspec_snapshot
model, settings, options, out = sys.argv[1:]
schedule_ahead()
more = {"async_scheduling": True, "distributed_executor_backend": "mp", **json.loads(options)}
with engine(Path(model), json.loads(settings), **more) as llm:
    found = run_features(llm, Path(model)), *llm.collective_rpc(knapspec_snapshot)
Path(out).write_bytes(pickle.dumps(found))
"""


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> list:
    with engine(smollm2_path, **OPTIONS) as llm:
        return run_features(llm, smollm2_path)


@pytest.mark.parity
def test_mixed_requests(expected: list, smollm2_path: Path) -> None:
    with engine(smollm2_path, {**PLAN, "debug_invariants": True}, **OPTIONS) as llm:
        got = run_features(llm, smollm2_path)
        stats = proposer_of(llm).stats
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert_same_answers(expected, got)


@pytest.mark.parity
def test_scheduled_ahead_of_a_worker_elsewhere(
    expected: list, smollm2_path: Path, tmp_path: Path
) -> None:
    """Grammars and rows of different ends, with decisions that travel."""
    out = tmp_path / "found"
    done = subprocess.run(
        [sys.executable, "-c", AHEAD, smollm2_path, json.dumps(PLAN), json.dumps(OPTIONS), out],
        capture_output=True, text=True, timeout=500, check=False, stdin=subprocess.DEVNULL,
        env={
            **os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "fork", "OMP_NUM_THREADS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "PYTHONPATH": str(Path(__file__).parent),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    got, snapshot = pickle.loads(out.read_bytes())
    assert_same_answers(expected, got)
    stats = json.loads(snapshot)["stats"]
    assert 0 < stats["accepted_tokens"] < stats["draft_tokens"]
    assert stats["clipped_rows"]["max_tokens"] > 0
