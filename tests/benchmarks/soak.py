# SPDX-License-Identifier: Apache-2.0
"""A server under steady load: `python tests/benchmarks/soak.py --minutes 10`.

Many OpenAI clients stream answers at once; some opt out of speculation, some sample, some hang up
half-way. At the end: errors, memory over time, and whether the server's metrics say what the
clients counted. Exit status 1 if an error occurred, memory grew or the counts differ. With --plain
the same load on plain vLLM, to tell whose growth it is.

vLLM's and oneDNN's matmuls on a CPU keep prepared kernels by the number of tokens of a step, 128 a
shape and 1,024 in all, and memory grows until these caches are full: for 11 minutes and 790 answers
of this load (2 cores, 90 layers; 537 MiB), and by 0.1% in the 10 minutes after. Hence the warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from arms import RESULTS, provenance

from knapspec_vllm import cli
from knapspec_vllm.bench.checkpoints import expand_blocks, smollm2
from knapspec_vllm.bench.servers import Server, running
from knapspec_vllm.commands.server_metrics import Reading, read, summary

NAME = "soak"
WORDS = " ".join(pydoc_data.topics.topics.values()).split()
SAMPLE_SECONDS = 5.0
PUBLISH_SECONDS = 3.0
MOST_DRAFTED = 6


class Load:
    """What all clients did, and how it ended."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
        )
        self.max_tokens = max_tokens
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.stop = threading.Event()

    def run(self, number: int) -> None:
        choose = random.Random(number)
        while not self.stop.is_set():
            try:
                self.ask(choose)
            except Exception as error:
                with self.lock:
                    self.errors.append(f"{type(error).__name__}: {error}")

    def ask(self, choose: random.Random) -> None:
        start = choose.randrange(len(WORDS) - 400)
        words = WORDS[start : start + choose.choice([8, 30, 100, 300])]
        hang_up = choose.random() < 0.03
        extra = {"vllm_xargs": {"knapspec_draft_length": 0}} if choose.random() < 0.1 else {}
        stream = self.client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Explain: " + " ".join(words)}],
            temperature=choose.choice([0, 0, 0.8]),
            max_tokens=choose.randrange(16, self.max_tokens),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        seen = tokens = 0
        for chunk in stream:
            seen += bool(chunk.choices)
            if hang_up and seen > 5:
                stream.close()
                break
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        with self.lock:
            if hang_up and not tokens:
                self.counts["hung_up"] += 1
            else:
                self.counts["answers"] += 1
                self.counts["tokens"] += tokens
                self.counts["opted_out"] += bool(extra)


def memory_mib(root: psutil.Process) -> dict[str, float]:
    """Resident memory of a process and all below it, by name; shared pages count in each."""
    found: Counter[str] = Counter()
    for process in [root, *root.children(recursive=True)]:
        try:
            found[_called(process)] += process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    return dict(found)


def _called(process: psutil.Process) -> str:
    """vLLM titles its engine core; the server itself and its helpers are told by what they run."""
    command = process.cmdline()
    if command and command[0].startswith("VLLM::"):
        return command[0]
    return "server" if "serve" in command else "helpers"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="after the warm-up")
    parser.add_argument("--warm-up", type=float, default=10.0, metavar="MINUTES")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--plain", action="store_true", help="without KnapSpec, to compare with")
    parser.add_argument("--planted", action="store_true", help="the block-expanded model")
    parser.add_argument("--settings", type=json.loads, default={}, help="KnapSpec settings, JSON")
    parser.add_argument(
        "--picture", type=Path, help="scrape with a Prometheus, and draw the dashboard at the end"
    )
    parser.add_argument("--top", type=Path, help="save what `knapspec top` shows at the end (SVG)")
    parser.add_argument("--growth", type=float, default=0.05, help="most growth of memory")
    parser.add_argument("--name", default="soak", help="name of the result file")
    arguments = parser.parse_args()
    model = expand_blocks(smollm2()) if arguments.planted else smollm2()
    folder = Path(tempfile.mkdtemp(prefix="knapspec-soak-"))
    settings = {"store_dir": str(folder), **arguments.settings}
    selected = [
        "--speculative-config="
        + json.dumps({"method": "knapspec", "num_speculative_tokens": MOST_DRAFTED}),
        f"--additional-config={json.dumps({'knapspec': settings})}",
    ]
    server = Server(
        "soak",
        str(model),
        [
            "--dtype=bfloat16",
            "--max-model-len=2048",
            f"--max-num-seqs={arguments.streams}",
            f"--served-model-name={NAME}",
            *([] if arguments.plain else selected),
        ],
        folder / "server.log",
        {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"},
    )
    with running([server], timeout_seconds=900):
        print(f"ready; {arguments.streams} streams, log {server.log}", flush=True)
        result = pictured(server, arguments, folder)
    result |= {"provenance": provenance(), "settings": arguments.settings, "model": model.name}
    # Memory depends on the allocator: glibc's keeps more of what is freed than tcmalloc does.
    preloaded = os.getenv("LD_PRELOAD", "").split(":")
    result["preloaded"] = [Path(file).name for file in preloaded if file]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("load", "memory", "checks")}, indent=1))
    return 0 if all(check["passed"] for check in result["checks"].values()) else 1


def pictured(server: Server, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if arguments.picture is None:
        return soak(server, arguments)
    from dashboard_picture import draw

    from tests.monitoring import prometheus

    with prometheus(server.url.removeprefix("http://"), folder) as found:
        start = time.time()
        result = soak(server, arguments)
        draw(found.url, start + 20, time.time() - 5, arguments.picture)
    return result


def soak(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    load = Load(server.url, arguments.max_tokens)
    before = read(server.url)
    threads = [
        threading.Thread(target=load.run, args=(number,), daemon=True)
        for number in range(arguments.streams)
    ]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    samples = []
    seconds = 60 * (arguments.warm_up + arguments.minutes)
    while (now := time.monotonic() - begun) < seconds:
        time.sleep(SAMPLE_SECONDS)
        samples.append((round(now), memory_mib(root)))
        if len(samples) % 12 == 0:
            print(
                f"  {now / 60:.0f} min: {load.counts['answers']} answers, "
                f"{len(load.errors)} errors, {sum(samples[-1][1].values()):.0f} MiB",
                flush=True,
            )
    if arguments.top is not None:
        cli.main(["top", server.url, "--once", "--picture", str(arguments.top)])
    load.stop.set()
    for thread in threads:
        thread.join(600)
    time.sleep(PUBLISH_SECONDS)
    after = read(server.url)
    return report(load, samples, before, after, arguments)


def report(
    load: Load,
    samples: list[tuple[int, dict[str, float]]],
    before: Reading,
    after: Reading,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    warm = 60 * arguments.warm_up
    steady = [by_name for at, by_name in samples if at >= warm]
    minute = max(1, int(60 / SAMPLE_SECONDS))
    ends = {"after_warm_up_mib": steady[:minute], "at_the_end_mib": steady[-minute:]}
    memory = {
        title: {
            name: round(statistics.median(by_name.get(name, 0.0) for by_name in part), 1)
            for name in sorted(set().union(*steady))
        }
        for title, part in ends.items()
    }
    first, last = (sum(by_name.values()) for by_name in memory.values())

    def counted(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    generated = counted("vllm:generation_tokens_total")
    drafted, accepted = (counted(f"knapspec:{n}_tokens_total") for n in ("draft", "accepted"))
    placeholders = counted("knapspec:placeholder_tokens_total")
    vllm_drafted = counted("vllm:spec_decode_num_draft_tokens_total")
    vllm_accepted = counted("vllm:spec_decode_num_accepted_tokens_total")
    most_lost = load.counts["hung_up"] * arguments.max_tokens
    in_flight = load.counts["hung_up"] * MOST_DRAFTED
    checks: dict[str, tuple[bool, Any]] = {
        "no error": (not load.errors, load.errors[:5]),
        "memory": (last <= first * (1 + arguments.growth), f"{last / first - 1:+.2%}"),
        "tokens": (
            load.counts["tokens"] <= generated <= load.counts["tokens"] + most_lost,
            f"clients {load.counts['tokens']}, server {generated:.0f}, "
            f"{load.counts['hung_up']} hung up",
        ),
        # A request that ends while its draft is being verified is counted by vLLM only; one whose
        # client hangs up meanwhile by KnapSpec only, as vLLM's scheduler has dropped it by then.
        "drafts": (
            -in_flight <= vllm_drafted - drafted - placeholders <= most_lost,
            f"KnapSpec {drafted:.0f}, vLLM {vllm_drafted:.0f}, placeholders {placeholders:.0f}",
        ),
        "accepted": (
            -in_flight <= vllm_accepted - accepted <= placeholders + most_lost,
            f"KnapSpec {accepted:.0f}, vLLM {vllm_accepted:.0f}",
        ),
    }
    return {
        "minutes": arguments.minutes,
        "streams": arguments.streams,
        "load": dict(load.counts),
        "memory": {**memory, "samples": [(at, round(sum(m.values()), 1)) for at, m in samples]},
        "checks": {name: {"passed": ok, "found": found} for name, (ok, found) in checks.items()},
        "server": summary(before, after),
        "round_seconds": {
            f"{source} {what}": counted("knapspec:round_seconds_total", source=source, what=what)
            for source in ("predicted", "observed")
            for what in ("round", "plain")
        },
    }


if __name__ == "__main__":
    sys.exit(main())
