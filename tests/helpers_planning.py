# SPDX-License-Identifier: Apache-2.0
"""Planning over costs and plans made up for tests, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.draft.planning import Planning
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner.types import Batch, Choice
from tests.helpers_policy import HALF, LAYERS, costs, frontier

ONE_RANK = SimpleNamespace(leads=True, alone=True, share=lambda value, seen=None: value)


def planning(hits: int, **settings: Any) -> tuple[Planning, list[Batch]]:
    """With a frontier of one plan; the batches that the policy was asked about are listed."""
    settings = {"prior_weight": 1e-9, "round_overhead_us": 0.0, "resolve": False, **settings}
    engine: Any = SimpleNamespace(view=SimpleNamespace(num_layers=LAYERS))
    made = Planning(
        KnapSpecConfig(**settings), engine, None, ONE_RANK, Stats(), 4, costs(),
        frontier((HALF, hits)), lambda found: None,
    )  # fmt: skip
    assert made.policy is not None
    asked: list[Batch] = []
    choose = made.policy.choose

    def recorded(batch: Batch, most: int) -> Choice:
        asked.append(batch)
        return choose(batch, most)

    made.policy.choose = recorded  # type: ignore[method-assign]
    return made, asked
