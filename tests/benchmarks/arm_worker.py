# SPDX-License-Identifier: Apache-2.0
"""One arm of a benchmark: an engine in a process of its own that runs rounds on request.

Reads one JSON object a line from stdin and answers with one on the original stdout; see arms.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    # vLLM logs to stdout: keep the real one for answers and send the rest to the log file.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    settings = json.loads(sys.argv[1])
    start = time.perf_counter()
    llm = LLM(disable_log_stats=False, **settings)
    reply(answers, {"ready_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        request = json.loads(line)
        params = SamplingParams(ignore_eos=True, **request["sampling"])
        batch = request["batch"]
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        before = counters(llm)
        tokens: list[list[int]] = []
        start = time.perf_counter()
        for at in range(0, len(prompts), batch):
            outputs = llm.generate(prompts[at : at + batch], params, use_tqdm=False)
            tokens += [list(output.outputs[0].token_ids) for output in outputs]
        seconds = time.perf_counter() - start
        after = counters(llm)
        reply(
            answers,
            {
                "seconds": seconds,
                "tokens": tokens,
                "counters": {name: after[name] - before.get(name, 0) for name in after},
                "knapspec": knapspec_state(llm),
            },
        )
    llm.llm_engine.engine_core.shutdown()


def counters(llm: Any) -> dict[str, float]:
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }


def knapspec_state(llm: Any) -> dict[str, Any] | None:
    """What the planner did so far; None for an arm without KnapSpec."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    planning = getattr(getattr(runner, "drafter", None), "planning", None)
    if planning is None:
        return None
    last = planning.last_choice
    drafting = planning.last_drafting_choice
    return {
        "decision": last.reason,
        "plan": None if drafting.plan is None else drafting.plan.describe(),
        "draft_length": drafting.draft_length,
        "predicted_speedup": drafting.predicted_speedup,
        "stats": runner.drafter.stats.as_dict(),
    }


def reply(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
