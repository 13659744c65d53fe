# SPDX-License-Identifier: Apache-2.0
"""Times kernels: median of many runs, share of the copy bandwidth, ratio to baselines, provenance.

On a GPU every callable is captured in a CUDA graph, as it runs in a server, and replayed with a
cold L2 cache; what cannot be captured is called directly and marked. Replaying even one tiny kernel
takes some microseconds. Without a GPU the benches run toy sizes under Triton's interpreter, which
only shows that they work: the times mean nothing.

Import this module before anything that imports triton.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    # The interpreter has to be on before triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = 0
BUDGET_MS = 300.0
"""Time to spend on the timed runs of one callable."""
RUNS = (10, 1000)
"""Fewest and most timed runs of one callable."""
FLUSH_BYTES = 256 << 20
"""Written before each run: five times the L2 cache of an H100."""


@dataclass(frozen=True)
class Case:
    """One size of one op. Callables run on ready inputs and may change them in place."""

    name: str
    run: Callable[[], object]
    #: Bytes that must be read and written at least, each once.
    moved_bytes: int
    flops: int = 0
    #: What to compare with, by name, on the same inputs.
    baselines: dict[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a run."""

    median: float
    p20: float
    p80: float
    runs: int
    #: Whether the runs were replays of a CUDA graph.
    graph: bool


def is_toy() -> bool:
    """Whether sizes should be tiny because kernels are interpreted."""
    return not torch.cuda.is_available()


def bench_device() -> torch.device:
    """Where inputs belong; seeds torch, so that inputs are the same in every run."""
    torch.manual_seed(SEED)
    return torch.device("cpu" if is_toy() else "cuda")


def measure(run: Callable[[], object], budget_ms: float = BUDGET_MS) -> Timing:
    """Times one callable after warming it up."""
    if is_toy():
        times = [_timed_on_host(run) for _ in range(3)]
        return _timing(times, graph=False)
    replay, graph = _captured(run)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    estimate = _timed_on_gpu(replay, flush, 5)
    fewest, most = RUNS
    typical = max(sorted(estimate)[len(estimate) // 2], 1e-3)
    count = max(fewest, min(most, int(budget_ms / typical)))
    return _timing(_timed_on_gpu(replay, flush, count), graph=graph)


def copy_gbps() -> float:
    """Measured bandwidth of a large copy, read plus written, GB/s: what a kernel can hope for.

    By a kernel: in a CUDA graph `copy_` becomes a copy engine's work, 2.7 instead of some 4 TB/s on
    an H200.
    """
    source = torch.ones((1 << 16) if is_toy() else (1 << 28), device=bench_device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / (measure(lambda: torch.neg(source, out=target)).median * 1e6)


def provenance() -> dict[str, Any]:
    """What ran, where, when and with what."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "command": " ".join(["python", *sys.argv]),
        "seed": SEED,
        "toy": is_toy(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "triton", "vllm", "flashinfer-python")},
    }
    if is_toy():
        return found | {"device": f"{platform.machine()}, Triton's interpreter"}
    properties = torch.cuda.get_device_properties(0)
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    values = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split(", ")
    return found | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "gpu_state": dict(zip(fields.split(","), values, strict=False)),
    }


def report(op: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Times the cases, prints a table and returns its rows; `--json FILE` also writes them."""
    parser = argparse.ArgumentParser(description=f"bench of {op}")
    parser.add_argument("--json", type=Path, help="write results and provenance to this file")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--budget-ms", type=float, default=BUDGET_MS, help="time of each callable")
    arguments, _ = parser.parse_known_args()
    about = provenance()
    copy = copy_gbps()
    print(f"{op} on {about['device']}, git {about['git']}, torch {about['versions']['torch']}, "
          f"triton {about['versions']['triton']}; a copy reaches {copy:.0f} GB/s")  # fmt: skip
    if is_toy():
        print("No GPU: toy sizes under Triton's interpreter. The times say nothing of a GPU.")
    width = max([len(case.name) for case in cases] + [4])
    print(f"{'case':<{width}}  {'median ms':>10} {'p20..p80':>17} {'GB/s':>7} {'of copy':>7} "
          f"{'TFLOP/s':>7}  baselines: ms (times slower)")  # fmt: skip
    rows = []
    for case in cases:
        if arguments.only in case.name:
            row = _run_case(case, copy, arguments.budget_ms)
            rows.append(row)
            _print_row(row, width)
    if arguments.json:
        result = {"op": op, "provenance": about, "copy_gbps": copy, "cases": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {arguments.json}")
    return rows


def _run_case(case: Case, copy: float, budget_ms: float) -> dict[str, Any]:
    timing = measure(case.run, budget_ms)
    gbps = case.moved_bytes / (timing.median * 1e6)
    baselines = {}
    for name, run in case.baselines.items():
        other = measure(run, budget_ms)
        baselines[name] = asdict(other) | {"ratio": other.median / timing.median}
    return {
        "case": case.name,
        "ms": asdict(timing),
        "moved_bytes": case.moved_bytes,
        "gbps": gbps,
        "share_of_copy": gbps / copy,
        "flops": case.flops,
        "tflops": case.flops / (timing.median * 1e9),
        "baselines": baselines,
    }


def _print_row(row: dict[str, Any], width: int) -> None:
    def ms(timing: dict[str, Any]) -> str:
        return f"{timing['median']:.4f}" + ("" if timing["graph"] or is_toy() else "*")

    spread = f"{row['ms']['p20']:.4f}..{row['ms']['p80']:.4f}"
    tflops = f"{row['tflops']:.1f}" if row["flops"] else "-"
    others = ", ".join(
        f"{name} {ms(other)} ({other['ratio']:.2f}x)" for name, other in row["baselines"].items()
    )
    print(f"{row['case']:<{width}}  {ms(row['ms']):>10} {spread:>17} {row['gbps']:>7.0f} "
          f"{row['share_of_copy']:>7.0%} {tflops:>7}  {others}")  # fmt: skip
    timings = [row["ms"], *row["baselines"].values()]
    if not is_toy() and not all(timing["graph"] for timing in timings):
        print(f"{'':<{width}}  * not a CUDA graph: launch overhead is included")


def _captured(run: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """A replay of `run` and True, or `run` itself and False where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and allocates outside the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"not capturable: {str(error).splitlines()[0]}", file=sys.stderr)
        return run, False
    return graph.replay, True


def _timed_on_gpu(run: Callable[[], object], flush: torch.Tensor, count: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        flush.zero_()  # also keeps the GPU busy while the host enqueues the run
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _timed_on_host(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _timing(times: list[float], *, graph: bool) -> Timing:
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    median, p20, p80 = quantiles.tolist()
    return Timing(median, p20, p80, len(times), graph)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
