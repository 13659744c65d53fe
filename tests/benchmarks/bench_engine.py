# SPDX-License-Identifier: Apache-2.0
"""Where the time of one engine goes: `python tests/benchmarks/bench_engine.py MODEL --out F.json`.

Needs no tokenizer, so that it runs a model of random weights (planted_8b.py) on a GPU machine
without a network. For each batch and context:

plain      with --plain, stock vLLM as shipped, in a process layout of its own choosing
declining  tokens a second where every round is declined
drafting   the same where the planner decides; declined and drafting rounds of requests alternate
alike      answers of the last two of them that are the same, token for token
busy       share of the time in which the GPU computes, in either, and the kernels it spends it on
step       one draft step of the plan that was drafted with, captured and launch by launch
solve      one solve at the defaults and one with 48 reference tokens; no wait for the device

With --hold FILE it then keeps the GPU memory it has until FILE exists: engines that start beside
one that ends cannot tell whose memory came free.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine_solves import solves, spread
from engines import proposer_of

from knapspec_vllm.bench.provenance import provenance
from knapspec_vllm.bench.trace import Turns
from knapspec_vllm.bench.worker import engine_facts, knapspec_state, run_batch

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[2000])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--vocabulary", type=int, default=40000, help="prompts stay below this id")
    parser.add_argument("--settings", type=json.loads, default={}, help="KnapSpec's, as JSON")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="of vllm.LLM, as JSON")
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not arguments.plain:  # looked into from here
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")

    found: dict[str, Any] = {"provenance": provenance(), "cells": []}

    def save() -> None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")

    llm = start(arguments)
    found["engine"] = engine_facts(llm)
    save()
    for context in arguments.context:
        for batch in arguments.batch:
            prompts = [prompt(context, row, arguments.vocabulary) for row in range(batch)]
            cell = Cell(llm, prompts, arguments.tokens)
            found["cells"].append(cell.plain() if arguments.plain else cell.knapspec())
            long = ("kernels", "counted", "state")
            print(json.dumps({k: v for k, v in found["cells"][-1].items() if k not in long}))
            save()
    if not arguments.plain:
        request = prompt(max(arguments.context), 99, arguments.vocabulary)
        found["solves"] = solves(llm, request, sampling(4))
        print(json.dumps(found["solves"]))
        found["knapspec"] = knapspec_state(llm)
        save()
    while arguments.hold is not None and not arguments.hold.exists():
        time.sleep(0.5)
    llm.llm_engine.engine_core.shutdown()


def start(arguments: argparse.Namespace) -> Any:
    from vllm import LLM

    settings = {
        "model": arguments.model,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "max_model_len": max(arguments.context) + arguments.tokens + 32,
        "dtype": "bfloat16",
        **arguments.engine_args,
    }
    if not arguments.plain:
        own = {"method": "knapspec", "num_speculative_tokens": 8, **arguments.settings}
        settings["speculative_config"] = own
    return LLM(**settings)


@dataclass(frozen=True)
class Run:
    """One batch of requests."""

    speed: float
    """Tokens a second while every row decodes."""
    tokens: list[list[int]]
    counted: dict[str, Any]


def alike(expected: list[list[int]], found: list[list[int]]) -> dict[str, Any]:
    """Answers that are the same, and tokens up to the first that differs. In bfloat16 near-ties
    turn out either way; a draft that were not verified would differ within a round or two."""
    prefixes = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(expected, found, strict=True)
    ]
    same = sum(n == len(x) for n, x in zip(prefixes, expected, strict=True))
    return {"same": same, "of": len(expected), "tokens_up_to_a_difference": prefixes}


class Cell:
    """One batch and context of an engine."""

    def __init__(self, llm: Any, prompts: list[list[int]], tokens: int) -> None:
        self._llm, self._prompts = llm, prompts
        self._batch, self._context = len(prompts), len(prompts[0])
        self._sampling = sampling(tokens)

    def plain(self) -> dict[str, Any]:
        self._run()
        return {**self._facts(), "plain": spread([self._run().speed for _ in range(ROUNDS)])}

    def knapspec(self) -> dict[str, Any]:
        planning = proposer_of(self._llm).planning
        run, free = self._run, (planning._forced, planning._forced_length)

        def declining(run: Callable[[], Any]) -> Any:
            from knapspec_vllm.planner.types import Plan

            planning.force(Plan.full(proposer_of(self._llm).engine.view.num_layers), 0)
            try:
                return run()
            finally:
                planning._forced, planning._forced_length = free

        for _ in range(3):  # solves, captures, learns
            run()
        declining(run)
        rounds = [(declining(run), run()) for _ in range(ROUNDS)]
        declined, drafted = ([one.speed for one in arm] for arm in zip(*rounds, strict=True))
        last_declined, last_drafted = rounds[-1]
        state = knapspec_state(self._llm)
        assert state is not None
        found = {
            **self._facts(),
            "declining": spread(declined),
            "drafting": spread(drafted),
            "ratio": spread([b / a for a, b in zip(declined, drafted, strict=True)]),
            "alike": alike(last_declined.tokens, last_drafted.tokens),
            "counted": last_drafted.counted,
            "state": {k: v for k, v in state.items() if k != "settings"},
            "kernels": {"declining": declining(self._busy), "drafting": self._busy()},
        }
        found["busy"] = {name: kernels["share"] for name, kernels in found["kernels"].items()}
        found["step_ms"] = self._steps()
        return found

    def _facts(self) -> dict[str, Any]:
        return {"batch": self._batch, "context": self._context}

    def _run(self) -> Run:
        result, counted, state = run_batch(self._llm, self._prompts, self._sampling, Turns())
        seconds, tokens = result["full"] or result["decode"]
        stats = (state or {}).get("stats", {})
        return Run(
            tokens / seconds,
            [request["tokens"] for request in result["requests"]],
            {"vllm": counted, "knapspec": stats},
        )

    def _busy(self) -> dict[str, Any]:
        """Kernels of 16 tokens' decode by their share of the wall time; none on a CPU."""
        from torch.profiler import ProfilerActivity, profile
        from vllm import SamplingParams

        requests = [{"prompt_token_ids": ids} for ids in self._prompts]
        params = SamplingParams(**{**self._sampling, "max_tokens": 17})
        if not torch.cuda.is_available():
            return {"share": None}
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            began = time.perf_counter()
            self._llm.generate(requests, params, use_tqdm=False)
            torch.cuda.synchronize()
            wall_us = (time.perf_counter() - began) * 1e6
        rows = [
            (event.key[:90], event.self_device_time_total, event.count)
            for event in profiler.key_averages()
        ]
        rows.sort(key=lambda row: -row[1])
        busy_us = sum(row[1] for row in rows)
        top = [{"kernel": k, "us": round(us), "count": n} for k, us, n in rows[:25]]
        return {"wall_us": wall_us, "busy_us": busy_us, "share": busy_us / wall_us, "top": top}

    def _steps(self) -> dict[str, float] | None:
        """Milliseconds of a draft step, read back, of the last plan that drafted."""
        from knapspec_vllm.calibration import cells, profiler

        proposer = proposer_of(self._llm)
        plan = proposer.planning.last_drafting_choice.plan
        if plan is None:
            return None
        rows = profiler.fake_rows(
            proposer.engine,
            cells.Cell(self._batch, self._context),
            proposer.num_speculative_tokens,
        )
        found = {}
        with torch.inference_mode():
            for name, captured in (("captured", True), ("launched", False)):
                step = profiler.draft_step(proposer.drafter, plan, rows, 8, captured)
                times = [profiler.once_us(proposer.engine, step) / 1e3 for _ in range(12)]
                found[name] = statistics.median(times[2:])
        # Its blocks are in the prefix cache, and overwritten.
        self._llm.reset_prefix_cache()
        return found


def prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    lowest = min(1000, vocabulary // 2)  # above what tokenizers keep for themselves
    return torch.randint(lowest, vocabulary, (length,), generator=generator).tolist()


def sampling(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}


if __name__ == "__main__":
    main()
