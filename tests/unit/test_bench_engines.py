# SPDX-License-Identifier: Apache-2.0
"""The worker protocol over a real process: turns, failures, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knapspec_vllm.bench import engines
from knapspec_vllm.bench.engines import EngineError, root_cause, running
from tests.helpers_bench import FakeEngine, process_state

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SAMPLING = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}


def request(prompts: list[list[int]], batch: int, turn: float = 0.0) -> dict:
    return {"prompts": prompts, "batch": batch, "sampling": SAMPLING, "turn": turn}


def pids(engine: FakeEngine) -> list[int]:
    """Of the worker and of its child."""
    assert engine.process is not None
    return [engine.process.pid, engine.facts["child"]]


def wait_for(states: str, processes: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(process_state(pid) in states for pid in processes):
            return True
        time.sleep(0.02)
    return False


def test_idle_engines_stand_still_and_all_end() -> None:
    first, second = FakeEngine("a", {"speed": 5.0}), FakeEngine("b", {})
    with running([first, second]):
        everyone = [pids(engine) for engine in (first, second)]
        assert wait_for("T", [pid for group in everyone for pid in group])
        answer = first.turn(request([[4], [5], [6]], 2))
        assert wait_for("T", [pid for group in everyone for pid in group])
        assert second.turn(request([[4]], 1, turn=0.5)) is None, "not yet"
        assert wait_for("T", everyone[1])
        assert second.turn({}) is not None
    assert answer is not None
    assert [len(batch["requests"]) for batch in answer["batches"]] == [2, 1]
    assert [batch["seconds"] for batch in answer["batches"]] == [0.8, 0.4]
    assert answer["batches"][1]["requests"][0]["tokens"] == [6, 6, 6]
    assert wait_for("XZ", [pid for group in everyone for pid in group])
    first.stop()  # again: nothing to do
    assert first.log is not None
    assert not first.log.exists(), "there is nothing to read in it"


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("refuses", "arm x: unknown setting 'wnidow_tokens'"),
        ("crashes", "arm x: no room for weights"),
    ],
)
def test_a_failed_start_says_why_in_one_line(behaviour: str, words: str) -> None:
    engine = FakeEngine("x", {"behaviour": behaviour})
    with pytest.raises(EngineError) as caught, running([FakeEngine("y", {}), engine]):
        pass
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    assert engine.log is not None
    assert engine.log.exists()
    assert str(engine.log) in str(caught.value)


def test_a_death_in_the_middle_is_noticed_though_a_child_holds_the_pipe() -> None:
    engine = FakeEngine("x", {"behaviour": "dies"})
    with pytest.raises(EngineError, match="its process ended"), running([engine]):
        everyone = pids(engine)
        engine.turn(request([[1]], 1))
    assert wait_for("XZ", everyone)


def test_a_hanging_engine_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "STOP_SECONDS", 0.5)
    engine = FakeEngine("x", {"behaviour": "hangs"}, timeout_seconds=1.0)
    with pytest.raises(EngineError, match=r"no answer in 1 s \(--timeout\)"), running([engine]):
        everyone = pids(engine)
        engine.turn(request([[1]], 1))
    assert wait_for("XZ", everyone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_engines_end_with_the_benchmark(number: signal.Signals) -> None:
    """Also when it is killed outright, which it cannot answer, and though one stands still."""
    script = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever these tests were started by
from knapspec_vllm.bench.engines import running, signal_group
from tests.helpers_bench import FakeEngine
idle, working = FakeEngine("idle", {}), FakeEngine("working", {})
with running([idle, working]):
    signal_group(working.process.pid, signal.SIGCONT)
    found = [p for e in (idle, working) for p in (e.process.pid, e.facts["child"])]
    print("pids", *found, flush=True)
    time.sleep(600)
"""
    bench = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    processes: list[int] = []
    try:
        assert bench.stdout is not None
        line = next(line for line in bench.stdout if line.startswith("pids"))
        processes = [int(word) for word in line.split()[1:]]
        assert wait_for("T", processes[:2])
        bench.send_signal(number)
        bench.wait(60)
        # A killed benchmark tells the working engine's worker only; vLLM's ends its own children.
        judged = processes if number == signal.SIGINT else processes[:3]
        assert wait_for("XZ", judged)
    finally:
        for pid in (bench.pid, *processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


LOG = """
INFO 01-01 [x.py:1] fine
(EngineCore pid=7) ERROR pydantic_core._pydantic_core.ValidationError: 1 validation error for X
(EngineCore pid=7) ERROR   Value error, KnapSpec: pipeline parallel is refused
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_root_cause() -> None:
    assert "pipeline parallel is refused" in (root_cause(LOG) or "")
    assert root_cause("all fine\n") is None
    assert root_cause("torch.OutOfMemoryError: CUDA out of memory\n") == "CUDA out of memory"
