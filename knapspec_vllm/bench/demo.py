# SPDX-License-Identifier: Apache-2.0
"""`make demo`: plain vLLM and KnapSpec side by side, on the same prompts, in the same run.

Three servers per model: plain vLLM, KnapSpec as it decides, and KnapSpec made to speculate. They
take turns answering, so that whatever else the machine does falls on all of them. Only one works at
a time; they run together where memory allows, else one after another.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from knapspec_vllm.bench import checkpoints, report
from knapspec_vllm.bench.capacity import available_memory, on_gpu
from knapspec_vllm.bench.measure import MODEL_NAME, Arm, Chat, PlanLog, SpecCounters
from knapspec_vllm.bench.servers import (
    Server,
    ServerError,
    install_signal_handlers,
    running,
    speculative_config,
)

PROMPTS = [
    "What is the capital of France, and what is it known for?",
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List the planets of the solar system, and one fact about each.",
    "Rewrite politely: send me the report now, you are late.",
]
WARM_UP = "Tell me about the history of bread."
EXPANDED_NOTE = (
    "This is SmolLM2-135M with two near-copies behind every layer: it writes real text at three\n"
    "times the cost, and two thirds of its sublayers can be skipped: KnapSpec has work to do."
)
# For a model without a chat template of its own.
PLAIN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    arguments = _parse(argv)
    install_signal_handlers()
    if not entry_points(group="vllm.general_plugins", name="knapspec"):
        print("knapspec-vllm is not installed here: run `pip install -e .` (or `make demo`)")
        return 1
    try:
        if arguments.model:
            compare(arguments.model, arguments)
            return 0
        print("Preparing the models", flush=True)
        real = checkpoints.smollm2()
        expanded = checkpoints.expand_blocks(real)
        compare(str(real), arguments)
        compare(str(expanded), arguments, note=EXPANDED_NOTE)
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; all servers are stopped", file=sys.stderr)
        return 130
    return 0


def compare(model: str, arguments: argparse.Namespace, note: str = "") -> list[Arm]:
    """Serve `model` in all arms, ask all prompts, print answers and table."""
    print(f"\n=== {Path(model).name} ({arguments.dtype}{_mode(arguments)})", flush=True)
    if note:
        print(note)
    together = _fit_together(model, 3)
    servers = make_servers(model, arguments, together)
    arms = [Arm(server.name) for server in servers]
    pairs = list(zip(servers, arms, strict=True))
    groups = [pairs] if together else [[pair] for pair in pairs]
    for group in groups:
        with running([server for server, _ in group], arguments.timeout):
            measure(group, arguments)
    print("\n" + report.answers(arms, PROMPTS))
    print("\n" + report.table(arms) + "\n")
    print(report.notes(arms, arguments.dtype), flush=True)
    return arms


def measure(group: list[tuple[Server, Arm]], arguments: argparse.Namespace) -> None:
    """Warm up every server of the group, then let them take turns, round by round."""
    chats = [Chat(server.url, arguments.max_tokens) for server, _ in group]
    before = []
    for chat, (server, _) in zip(chats, group, strict=True):
        for stream in (False, True):
            chat.ask(WARM_UP, stream)
        before.append(SpecCounters.from_metrics(server.metrics_text()))
    for number in range(arguments.rounds):
        stream = number % 2 == 1
        for chat, (server, arm) in zip(chats, group, strict=True):
            chat.run_round(arm, PROMPTS, stream)
            print(
                f"  round {number + 1}, {'streaming' if stream else 'whole answers'}, "
                f"{server.name}: {arm.rates[-1]:.1f} tokens/s",
                flush=True,
            )
    for (server, arm), start in zip(group, before, strict=True):
        arm.counters = SpecCounters.from_metrics(server.metrics_text()) - start
        if "--speculative-config" in server.arguments:
            arm.log = PlanLog.from_log(server.log_text())


def make_servers(model: str, arguments: argparse.Namespace, together: bool) -> list[Server]:
    """Three servers that differ in nothing but speculation."""
    local = Path(model).is_dir()
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if local:
        environment["HF_HUB_OFFLINE"] = "1"
    environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    common = ["--served-model-name", MODEL_NAME, "--dtype", arguments.dtype]
    common += ["--max-model-len", str(arguments.max_model_len)]
    if not arguments.compiled:
        common.append("--enforce-eager")
    if on_gpu():
        common += ["--gpu-memory-utilization", "0.28" if together else "0.85"]
    if local and not _has_chat_template(Path(model)):
        common += ["--chat-template", PLAIN_TEMPLATE]
    on = speculative_config(arguments.num_speculative_tokens)
    forced = [*on, "--additional-config", '{"knapspec": {"always_draft": true}}']
    logs = checkpoints.cache_dir() / "logs"
    stem = Path(model).name
    return [
        Server(name, model, common + extra, logs / f"{stem}-{file}.log", environment)
        for name, file, extra in (
            ("plain vLLM", "plain", []),
            ("KnapSpec", "knapspec", on),
            ("KnapSpec made to speculate", "forced", forced),
        )
    ]


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").exists():
        return True
    config = model / "tokenizer_config.json"
    return config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")


def _fit_together(model: str, servers: int) -> bool:
    """Whether that many servers of a local model fit in memory, weights and caches together."""
    if os.environ.get("DEMO_SEQUENTIAL") == "1" or not Path(model).is_dir():
        return False
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    overhead = 3 << 30  # two Python processes with torch, the KV cache, activations
    if on_gpu():
        import torch

        available = torch.cuda.mem_get_info()[0]
    else:
        available = available_memory()
    return servers * (weights + overhead) < available


def _mode(arguments: argparse.Namespace) -> str:
    if arguments.compiled:
        return ", compiled"
    return ", --enforce-eager in every arm; DEMO_COMPILED=1 compiles, minutes a server"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="plain vLLM and KnapSpec side by side")
    parser.add_argument("--model", help="path or hub id; default: SmolLM2-135M and its expansion")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=900, help="seconds a server may start for")
    arguments = parser.parse_args(argv)
    # Compiling takes minutes on a CPU and seconds on a GPU, where eager mode would not be fair.
    arguments.compiled = os.environ.get("DEMO_COMPILED", "1" if on_gpu() else "0") == "1"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
