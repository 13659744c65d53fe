# SPDX-License-Identifier: Apache-2.0
"""One arm of a benchmark: an engine in a process of its own.

Started as `python -m knapspec_vllm.bench.worker` with vllm.LLM's arguments as JSON. Reads one JSON
object a line from stdin and answers with one on the original stdout: first what the engine is, then
one answer per request; where something fails {"error": ...} and the end. A request with "turn" in
seconds is answered with {"turn": "over"} whenever they have passed, and goes on when the next line
comes, whatever it says. See `engines` as well.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any, TextIO

from knapspec_vllm.bench.counters import difference, total
from knapspec_vllm.bench.inspection import (
    knapspec_snapshot,
    knapspec_stood_still,
    worker_facts,
    worker_memory,
)
from knapspec_vllm.bench.trace import Turns, row_times, traced, windows

_COUNTERS = "vllm:spec_decode_"
#: Of a prompt's tokens; chat templates begin alike.
_CACHED_SHARE = 0.5


def main() -> int:
    # vLLM logs to stdout: keep the real one for answers and send the rest to the log file.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    llm = None
    try:
        from vllm import LLM

        start = time.perf_counter()
        # Servers keep statistics, and the time stamps of requests come with them.
        llm = LLM(**{"disable_log_stats": False, **json.loads(sys.argv[1])})
        _answer(answers, {"ready_seconds": time.perf_counter() - start, **engine_facts(llm)})
        for line in sys.stdin:
            request = json.loads(line)
            turns = Turns(request.pop("turn", 0.0), functools.partial(_next_turn, llm, answers))
            _answer(answers, run_round(llm, **request, turns=turns))
    except Exception as error:
        from knapspec_vllm.doctor import sentences

        traceback.print_exc()
        _answer(answers, {"error": " ".join(sentences(error)) or repr(error)})
        return 1
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
    return 0


def _next_turn(llm: Any, answers: TextIO) -> None:
    """Say that this turn is over, and wait for the next one."""
    _answer(answers, {"turn": "over"})
    if not sys.stdin.readline():
        raise EOFError("the benchmark ended in the middle of a batch")
    llm.collective_rpc(knapspec_stood_still)


def run_round(
    llm: Any,
    prompts: list[list[int]],
    batch: int,
    sampling: dict[str, Any],
    turns: Turns | None = None,
) -> dict[str, Any]:
    """All prompts, `batch` requests at a time; counters over the timed passes only."""
    turns = turns or Turns()
    batches = []
    counted_all: dict[str, Any] = {}
    state: dict[str, Any] | None = None
    for at in range(0, len(prompts), batch):
        result, counted, now = run_batch(llm, prompts[at : at + batch], sampling, turns)
        batches.append(result)
        counted_all = total(counted_all, counted)
        if now is not None:
            now["stats"] = total((state or {}).get("stats", {}), now.get("stats", {}))
            state = now
    return {
        "batches": batches,
        "counters": counted_all,
        "knapspec": state,
        "memory_bytes": sum(json.loads(text) for text in llm.collective_rpc(worker_memory)),
    }


def run_batch(
    llm: Any, prompts: list[list[int]], sampling: dict[str, Any], turns: Turns
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """(times and tokens, counted by vLLM, counted by KnapSpec) of one batch.

    The first pass only fills the prefix cache and gives the time to first token. So the second one
    is nearly all decode; what is left of prefill, the engine's time stamps leave out.
    """
    from vllm import SamplingParams

    requests = [{"prompt_token_ids": ids} for ids in prompts]
    first = llm.generate(requests, SamplingParams(**{**sampling, "max_tokens": 1}), use_tqdm=False)
    params = SamplingParams(**sampling)
    before, state_before = counters(llm), knapspec_state(llm)
    start, waited = time.monotonic(), turns.waited
    with traced(llm.llm_engine, turns) as steps:
        second = llm.generate(requests, params, use_tqdm=False)
    seconds = time.monotonic() - start - (turns.waited - waited)
    after, state = counters(llm), knapspec_state(llm)
    if state is not None:
        state["stats"] = difference(state.get("stats", {}), (state_before or {}).get("stats"))
    times = row_times(steps) or [(None, None)] * len(second)
    found = [_request(a, b, *t) for a, b, t in zip(first, second, times, strict=True)]
    result = {"seconds": seconds, "requests": found, **windows(steps)}
    return result, difference(after, before), state


def _request(first: Any, second: Any, begin: float | None, end: float | None) -> dict[str, Any]:
    """One request's tokens and times in seconds; None where this vLLM gives none."""
    cached = getattr(first, "num_cached_tokens", None) or 0
    return {
        "tokens": list(second.outputs[0].token_ids),
        "first": begin,
        "last": end,
        "ttft": getattr(getattr(first, "metrics", None), "first_token_latency", None),
        "cached": cached > _CACHED_SHARE * len(second.prompt_token_ids),
    }


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counts of speculative decoding, without their common prefix."""
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", getattr(metric, "values", None))
        if metric.name.startswith(_COUNTERS) and value is not None:
            name = metric.name.removeprefix(_COUNTERS)
            found[name] = total(found.get(name), _plain(value))
    return found


def _plain(value: Any) -> Any:
    return [int(part) for part in value] if isinstance(value, Iterable) else int(value)


def knapspec_state(llm: Any) -> dict[str, Any] | None:
    """`KnapSpecProposer.snapshot()` of the first rank; None for an arm without KnapSpec."""
    return json.loads(llm.collective_rpc(knapspec_snapshot)[0])


def engine_facts(llm: Any) -> dict[str, Any]:
    """What this engine really is, whatever was asked for."""
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "eager": bool(config.model_config.enforce_eager),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "max_model_len": config.model_config.max_model_len,
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "prefix_caching": bool(cache.enable_prefix_caching),
        "process_layout": "in process" if _in_process(llm) else "own process",
        **json.loads(llm.collective_rpc(worker_facts)[0]),
    }


def _in_process(llm: Any) -> bool:
    return type(llm.llm_engine.engine_core).__name__ == "InprocClient"


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
