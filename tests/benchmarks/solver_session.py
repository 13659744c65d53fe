# SPDX-License-Identifier: Apache-2.0
"""Runs both solvers, and the judge, on windows of text; see bench_solver.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import RESULTS, provenance
from solver_scoring import Pricing, read_costs
from solver_windows import PUBLISHED_REFERENCES, Window, make_windows

from knapspec_vllm.bench.checkpoints import smollm2
from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.planner.solver import SolverSettings, solve
from knapspec_vllm.planner.types import Plan, PlanEstimate
from tests.llama_runner import LlamaModel, LlamaRunner, Text, judge
from tests.published_solver import solve_published, target_states

#: A lone row gives the solver the reference tokens of all rows.
OUR_REFERENCES = KnapSpecConfig().reference_tokens * KnapSpecConfig().reference_rows


class Case:
    """One window: the target's pass over it, its costs, and what its judge has found so far."""

    def __init__(self, model: LlamaModel, window: Window, pricing: Pricing) -> None:
        self.window = window
        self.pricing = pricing
        self.agreement: dict[Plan, float] = {}
        """On the stretch behind the boundary, of the plans judged."""
        self._text = Text(model, window.tokens)

    def ours(
        self,
        settings: SolverSettings | None = None,
        references: int = OUR_REFERENCES,
    ) -> tuple[tuple[PlanEstimate, ...], float]:
        """Our frontier, and the seconds it took."""
        runner = self._before(references)
        weights, settings = self.pricing.weights, settings or SolverSettings()
        return _timed(lambda: solve(runner, weights, settings))

    def published(self) -> tuple[tuple[PlanEstimate, ...], float]:
        """The oracle's plans of all budgets, and the seconds they took."""
        runner = self._before(PUBLISHED_REFERENCES)
        weights = self.pricing.weights
        # Left behind by the verify pass in the published method: not part of its time.
        targets = target_states(runner)
        result, seconds = _timed(
            lambda: solve_published(runner, targets, weights.attention_full_us, weights.mlp_us)
        )
        return result.estimates, seconds

    def counted_anew(self, estimates: Sequence[PlanEstimate]) -> tuple[PlanEstimate, ...]:
        """The same plans with their hits on the reference tokens of the oracle."""
        hits = judge(self._before(PUBLISHED_REFERENCES), [estimate.plan for estimate in estimates])
        return tuple(
            dataclasses.replace(estimate, hits=count, trials=PUBLISHED_REFERENCES)
            for estimate, count in zip(estimates, hits, strict=True)
        )

    def judge(self, plans: Sequence[Plan]) -> None:
        """Runs the plans not judged yet on the stretch."""
        stretch = LlamaRunner(self._text, self.window.boundary, len(self.window.tokens))
        fresh = [plan for plan in dict.fromkeys(plans) if plan not in self.agreement]
        tokens = len(self.window.tokens) - self.window.boundary
        for plan, hits in zip(fresh, judge(stretch, fresh), strict=True):
            self.agreement[plan] = hits / tokens

    def _before(self, references: int) -> LlamaRunner:
        """`references` tokens before the boundary."""
        boundary = self.window.boundary
        return LlamaRunner(self._text, boundary - references, boundary)


class Session:
    """The model, its costs and the windows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = smollm2()
        self.windows = make_windows(folder, arguments.windows)
        self._model = LlamaModel(folder, getattr(torch, arguments.dtype))
        self._costs = read_costs(arguments.costs, arguments.weights)
        weights = Pricing.of(self._costs, self.windows[0].boundary).weights
        print(
            f"SmolLM2-135M, {arguments.dtype}, {torch.get_num_threads()} threads, "
            f"{len(self.windows)} windows, attention {weights.attention_full_us:.0f} us, "
            f"MLP {weights.mlp_us:.0f} us",
            flush=True,
        )

    def case(self, window: Window) -> Case:
        return Case(self._model, window, Pricing.of(self._costs, window.boundary))


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = run()
    return found, time.perf_counter() - started


def write(arguments: argparse.Namespace, name: str, results: dict[str, Any]) -> Path:
    """Writes results with their provenance as JSON; its path."""
    folder: Path = arguments.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    context = {
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "windows": arguments.windows,
        "weights": arguments.weights,
    }
    whole = _plain({**context, **provenance(), **results})
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path.name}")
    return path


def _plain(value: Any) -> Any:
    """With null where a figure is missing: JSON has no nan."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
