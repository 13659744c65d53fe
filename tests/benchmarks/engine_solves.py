# SPDX-License-Identifier: Apache-2.0
"""Times solves inside a running engine; see bench_engine.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from engines import proposer_of

from knapspec_vllm.bench.trace import Turns
from knapspec_vllm.bench.worker import run_batch


def solves(llm: Any, request: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of solves with windows for one row, and of what the host spends until they are
    under way, launch by launch and, where the server captured them, replayed."""
    from knapspec_vllm.draft.branches import VllmBranches
    from knapspec_vllm.planner.solver import ItemWeights, SolverSettings, start_solve

    proposer = proposer_of(llm)
    planning, engine, config = proposer.planning, proposer.engine, proposer.config
    weights, settings = ItemWeights(1.0, 0.5, 3.0), SolverSettings.of(config)
    found: dict[str, Any] = {}
    choose = planning.choose

    def timed(solve: Callable[[], Any]) -> dict[str, Any] | None:
        host, total = [], []
        for _ in range(6):
            engine.synchronize()
            began = time.perf_counter()
            pending = solve()
            host.append((time.perf_counter() - began) * 1e3)
            engine.synchronize()
            total.append((time.perf_counter() - began) * 1e3)
            if pending is None:
                return None
            pending.result()
        return {
            "host_ms": spread(host[1:]),
            "total_ms": spread(total[1:]),
            "first_ms": total[0],
            "waits": waits(solve),
        }

    def spy(batch: Any, most: int, references: Callable[[], Any], *rest: Any) -> Any:
        if references() is None:  # of a request's first step, where vLLM schedules ahead
            return choose(batch, most, references, *rest)
        planning.choose = choose
        for per_row in (config.reference_tokens, 48 // config.reference_rows):
            object.__setattr__(config, "reference_tokens", per_row)
            given = references()

            def launched(given: Any = given) -> Any:
                with torch.inference_mode():
                    runner = VllmBranches(engine, proposer.geometry, given)
                    return start_solve(runner, weights, settings)

            def replayed(given: Any = given) -> Any:
                graphs = planning.solving.graphs
                return None if graphs is None else graphs.start(given, weights)

            name = f"{len(given.tokens)} reference tokens"
            found[name] = {"launched": timed(launched), "replayed": timed(replayed)}
        return choose(batch, most, references, *rest)

    planning.choose = spy
    run_batch(llm, [request], sampling, Turns())
    return found


def waits(action: Callable[[], object]) -> str | None:
    """Where a GPU was waited for, as torch words it."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        action()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
