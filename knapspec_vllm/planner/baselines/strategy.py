# SPDX-License-Identifier: Apache-2.0
"""What a baseline offers, and how to get one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from knapspec_vllm.planner.baselines.clasp import Clasp
from knapspec_vllm.planner.baselines.early_exit import DynamicExit
from knapspec_vllm.planner.baselines.self_sd import SelfSpeculative
from knapspec_vllm.planner.baselines.swift import Swift
from knapspec_vllm.planner.solver import BranchRunner, ItemWeights, SolverSettings
from knapspec_vllm.planner.types import PlanEstimate


class Strategy(Protocol):
    """Finds plans to choose from. May remember earlier solves, so: one object an engine.

    Deterministic: equal calls in equal order give equal plans, whatever torch's global seed.
    """

    @property
    def name(self) -> str:
        """As `make` takes it."""

    @property
    def resolve_every(self) -> int | None:
        """Rounds from one solve to the next; None: the plans found are frozen. May change."""

    @property
    def reference_tokens(self) -> int:
        """Tokens, over all rows, that the method wants to judge plans on; a wish."""

    def solve(
        self, runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
    ) -> tuple[PlanEstimate, ...]:
        """Plans by ascending saving, judged on the runner's reference tokens; never all-FULL.

        Empty where the settings leave nothing to skip. Waits for the device.
        """


_MAKERS: dict[str, Callable[[], Strategy]] = {
    "self_sd": SelfSpeculative,
    "swift": Swift,
    "clasp": Clasp,
    "del": DynamicExit,
}
NAMES: tuple[str, ...] = tuple(_MAKERS)


def make(name: str) -> Strategy:
    """A fresh strategy. Raises ValueError naming the known ones."""
    if name not in _MAKERS:
        raise ValueError(f"unknown planner {name!r}, known are {', '.join(NAMES)}")
    return _MAKERS[name]()
