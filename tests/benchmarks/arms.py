# SPDX-License-Identifier: Apache-2.0
"""Benchmark arms as processes: all started first, then timed in turn, so that drift hits all alike.

Only one arm works at a time. Ratios are formed round by round; medians and minima are reported.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"


@dataclass
class Arm:
    """An engine in its own process. settings: keyword arguments of vllm.LLM."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Start the engine and wait until it can take requests."""
        self.log = tempfile.NamedTemporaryFile("w", suffix=f"-{self.name}.log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "arm_worker.py"), json.dumps(self.settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **ENVIRONMENT, **self.environment},
        )
        self.ready_seconds = self._read()["ready_seconds"]

    def run(
        self, prompts: list[list[int]], batch: int, sampling: dict[str, Any], counted: bool = True
    ) -> None:
        """One round over all prompts, `batch` requests at a time."""
        assert self.process.stdin is not None
        request = {"prompts": prompts, "batch": batch, "sampling": sampling}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.last = self._read()
        if counted:
            self.seconds.append(self.last["seconds"])

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = Path(self.log.name).read_text()[-3000:]
            raise RuntimeError(f"arm {self.name} ended; its log {self.log.name} ends:\n{tail}")
        return json.loads(line)


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
}


def alternate(
    arms: Sequence[Arm],
    prompts: list[list[int]],
    batch: int,
    sampling: dict[str, Any],
    rounds: int,
    warm_up: int = 1,
) -> None:
    """Start the arms one by one, warm up, then run `rounds` rounds with the arms in turn."""
    for arm in arms:
        arm.start()
        print(f"  {arm.name}: ready after {arm.ready_seconds:.0f} s", flush=True)
    for _ in range(warm_up):
        for arm in arms:
            arm.run(prompts, batch, sampling, counted=False)
    for number in range(rounds):
        for arm in arms:
            arm.run(prompts, batch, sampling)
        times = ", ".join(f"{arm.name} {arm.seconds[-1]:.2f} s" for arm in arms)
        print(f"  round {number + 1} of {rounds}: {times}", flush=True)
    for arm in arms:
        arm.stop()


def report(arms: Sequence[Arm], tokens: int, context: dict[str, Any], name: str) -> list[dict]:
    """Print the table (ratios against the first arm) and write it with its provenance as JSON."""
    base = arms[0]
    rows = []
    for arm in arms:
        ratios = sorted(a / b for a, b in zip(base.seconds, arm.seconds, strict=True))
        counters = arm.last["counters"]
        drafts = counters.get("vllm:spec_decode_num_drafts", 0)
        drafted = counters.get("vllm:spec_decode_num_draft_tokens", 0)
        accepted = counters.get("vllm:spec_decode_num_accepted_tokens", 0)
        same = sum(a == b for a, b in zip(arm.last["tokens"], base.last["tokens"], strict=True))
        rows.append(
            {
                "arm": arm.name,
                "tokens_per_second": tokens / statistics.median(arm.seconds),
                "ratio_median": statistics.median(ratios),
                "ratio_of_medians": statistics.median(base.seconds)
                / statistics.median(arm.seconds),
                "ratio_of_minima": min(base.seconds) / min(arm.seconds),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "accepted_length": 1 + accepted / drafts if drafts else None,
                "acceptance": accepted / drafted if drafted else None,
                "identical_outputs": f"{same} of {len(arm.last['tokens'])}",
                "seconds": arm.seconds,
                "knapspec": arm.last["knapspec"],
            }
        )
    print(
        f"\n{'arm':<24} {'tokens/s':>8} {'ratio median':>12} {'(min..max)':>13} {'of minima':>9} "
        f"{'accepted len':>12} {'identical':>10}"
    )
    for row in rows:
        length = row["accepted_length"]
        print(
            f"{row['arm']:<24} {row['tokens_per_second']:>8.1f} {row['ratio_median']:>11.2f}x "
            f"{row['ratio_min']:>6.2f}..{row['ratio_max']:<5.2f} {row['ratio_of_minima']:>8.2f}x "
            f"{'-' if length is None else format(length, '.2f'):>12} {row['identical_outputs']:>10}"
        )
        if row["knapspec"]:
            state = row["knapspec"]
            print(f"{'':<24} plan: {state['plan']}, draft length {state['draft_length']}, "
                  f"predicted {state['predicted_speedup']:.2f}x")  # fmt: skip
            print(f"{'':<24} last decision: {state['decision']}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**context, **provenance(), "arms": rows}, indent=1) + "\n")
    print(f"\nwrote {path.relative_to(ROOT)}")
    return rows


def provenance() -> dict[str, Any]:
    """Where, when and with what this ran."""
    import torch
    import vllm

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "device": cpu_name() if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vllm": vllm.__version__,
        },
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
