# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the benchmark's worker process, a tokenizer, and results made by hand."""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from knapspec_vllm.bench.engines import Engine
from knapspec_vllm.bench.results import Cell, Measurement, Results, Round

#: Speaks the protocol of knapspec_vllm.bench.worker; "speed" of its settings is tokens per second.
WORKER = """
import json, os, subprocess, sys, time
settings = json.loads(sys.argv[1])
behaviour = settings.get("behaviour", "")
answer = lambda value: print(json.dumps(value), flush=True)
if behaviour == "refuses":
    answer({"error": "unknown setting 'wnidow_tokens'"}); sys.exit(1)
if behaviour == "crashes":
    print("(EngineCore pid=7) ERROR [core.py:1] ValueError: no room for weights", file=sys.stderr)
    print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
    sys.exit(1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
answer({"ready_seconds": 0.1, "child": child.pid, "dtype": "float32", "threads": 1})
for line in sys.stdin:
    request = json.loads(line)
    if behaviour == "dies":
        os._exit(9)  # its child keeps the pipe open
    if behaviour == "hangs":
        time.sleep(600)
    tokens, batch, at = request["sampling"]["max_tokens"], request["batch"], 0
    speed = settings.get("speed", 10.0)
    if request["turn"]:
        answer({"turn": "over"}); sys.stdin.readline()
    batches = []
    for at in range(0, len(request["prompts"]), batch):
        rows = request["prompts"][at:at + batch]
        seconds = (tokens - 1) * len(rows) / speed
        times = {"first": 1.0, "last": 1.0 + seconds, "ttft": 0.5, "cached": False}
        outputs = [{"tokens": ids[:1] * tokens, **times} for ids in rows]
        window = [seconds, (tokens - 1) * len(rows)]
        batches.append({"seconds": seconds, "requests": outputs, "decode": window, "full": window})
    state, counters = None, {}
    if settings.get("speculative_config"):
        counters = {"num_drafts": 4, "num_draft_tokens": 12, "num_accepted_tokens": 6,
                    "num_accepted_tokens_per_pos": [3, 2, 1]}
        state = {"decision": "best of 3 plans", "plan": "skip attn:1", "draft_length": 3,
                 "predicted_speedup": 1.3, "stats": {
                     "rounds": 5, "drafting_rounds": 4, "draft_tokens": 12, "accepted_tokens": 6,
                     "predicted_plain_us": 1200.0, "predicted_round_us": 1000.0,
                     "phase_us": {"draft": 400.0, "plan": 10.0, "step": 600.0},
                     "drafted_by_position": [4, 4, 4], "accepted_by_position": [3, 2, 1],
                     "declined_rounds": {"loses": 1}}}
    answer({"batches": batches, "counters": counters, "knapspec": state})
child.kill()
"""


class FakeEngine(Engine):
    """An engine whose process is the stand-in."""

    @property
    def command(self) -> list[str]:
        import json

        return [sys.executable, "-c", WORKER, json.dumps(self.settings)]


class FakeTokenizer:
    """A token per word or sign, its number a checksum; a begin-of-text token in front of texts."""

    chat_template: str | None = "user and assistant"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = re.findall(r"\w+|\s+|[^\w\s]", text)
        opening = [1] if add_special_tokens else []
        return {"input_ids": [*opening, *(zlib.crc32(word.encode()) for word in words)]}

    def apply_chat_template(self, messages: list[dict], **_: Any) -> str:
        return f"<user>{messages[0]['content']}</user><assistant>"


CONFIG = SimpleNamespace(
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=64, dtype="bf16"
)


def make_round(speed: float, tokens: int = 100, **others: Any) -> Round:
    """A round of two requests at `speed` tokens per second."""
    values: dict[str, Any] = {
        "seconds": tokens / speed + 0.1,
        "decode_seconds": tokens / speed,
        "decode_tokens": tokens,
        "full_seconds": tokens / speed / 2,
        "full_tokens": tokens // 2,
        "output_tokens": tokens + 2,
        "tpot_seconds": 1 / speed,
        "ttft_seconds": 0.25,
        "outputs": ("a", "b"),
    }
    return Round(**{**values, **others})


def measured(
    arm: str, speeds: list[float], cell: Cell | None = None, session: int = 0, **others: Any
) -> Measurement:
    cell = cell or Cell(1, 64)
    return Measurement(arm, cell, session, tuple(make_round(s) for s in speeds), **others)


def stats_state(**stats: Any) -> dict[str, Any]:
    """A snapshot with these counters."""
    return {"decision": "best", "plan": None, "draft_length": 0, "stats": stats}


def grid_results() -> Results:
    """Plain, ngram, knapspec and declining over a grid of two batches, contexts, temperatures."""
    cells = [Cell(b, c, t) for t in (0.0, 1.0) for c in (64, 512) for b in (1, 4)]
    arms = {
        "plain": None,
        "ngram": {"method": "ngram"},
        "knapspec": {"method": "knapspec"},
        "declining": {"method": "knapspec", "min_speedup": 1e9},
    }
    counters = {"num_drafts": 8, "num_draft_tokens": 24, "num_accepted_tokens": 12,
                "num_accepted_tokens_per_pos": [6, 4, 2]}  # fmt: skip
    stats = {
        "rounds": 10, "drafting_rounds": 8, "draft_tokens": 24, "accepted_tokens": 18,
        "predicted_plain_us": 1300.0, "predicted_round_us": 1000.0,
        "phase_us": {"draft": 3e4, "plan": 200.0, "step": 5e4},
        "drafted_by_position": [8, 8, 8], "accepted_by_position": [7, 6, 5],
    }  # fmt: skip
    found = []
    for cell in cells:
        found.append(measured("plain", [100.0, 102.0, 98.0], cell))
        found.append(measured("ngram", [90.0, 95.0, 91.0], cell, counters=counters))
        state = stats_state(**stats)
        found.append(measured("knapspec", [120.0, 125.0, 118.0], cell, knapspec=state))
        found.append(
            measured("declining", [99.0, 101.0, 98.0], cell, knapspec=stats_state(rounds=9))
        )
    return Results(
        provenance={"git": "abc", "versions": {"vllm": "0"}, "cores": 2, "date": "today"},
        settings={"model": "m", "workload": "docs"},
        arms={name: {"speculative_config": config} for name, config in arms.items()},
        left_out={"suffix": "needs a package"},
        cells=cells,
        measurements=found,
    )


def process_state(pid: int) -> str:
    """The kernel's letter: T stopped, Z zombie, X gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"
