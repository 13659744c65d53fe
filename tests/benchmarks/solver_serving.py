# SPDX-License-Identifier: Apache-2.0
"""Our solver inside a running vLLM engine, called by hand; see bench_solver.py."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from knapspec_vllm.bench.checkpoints import smollm2
from knapspec_vllm.draft.branches import VllmBranches
from knapspec_vllm.planner.solver import ItemWeights, SolverSettings, start_solve

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "integration")]
importlib.import_module("tests.conftest")  # the environment vLLM starts in
engines = importlib.import_module("engines")

Solve = Callable[[ItemWeights], float]
"""Runs one solve at the default settings; the seconds it took, its result read back."""


@contextmanager
def serving(dtype: str) -> Iterator[Any]:
    """SmolLM2 behind vLLM with a forced plan: nothing is solved but what is asked for."""
    forced = {"plan": "skip mlp:5", "draft_length": 1}
    with engines.engine(smollm2(), forced, dtype=dtype, max_model_len=1024, max_num_seqs=1) as llm:
        yield llm


def at_first_round(llm: Any, tokens: Sequence[int], action: Callable[[Solve], None]) -> None:
    """Serves a prompt and runs `action` when its first round has to be decided."""
    proposer = engines.proposer_of(llm)
    choose = proposer.planning.choose

    def spy(batch: Any, most: int, references: Any, *rest: Any) -> Any:
        proposer.planning.choose = choose
        found = references()

        def solve(weights: ItemWeights) -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                runner = VllmBranches(proposer.engine, proposer.geometry, found)
                start_solve(runner, weights, SolverSettings()).result()
            return time.perf_counter() - started

        action(solve)
        return choose(batch, most, references, *rest)

    proposer.planning.choose = spy
    engines.greedy(llm, [list(tokens)], 4)
