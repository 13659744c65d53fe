# SPDX-License-Identifier: Apache-2.0
"""What a round turned out to be: what planning learns from."""

from __future__ import annotations

from dataclasses import dataclass

from knapspec_vllm.planner.types import Batch, Choice


@dataclass(frozen=True)
class Verified:
    """What verification did to the drafts of one row, in tokens."""

    accepted: int
    drafted: int
    """Scheduled."""
    context: int
    """The row's length."""
    telling: bool = True
    """Of the plan: a grammar cuts drafts by value."""


@dataclass(frozen=True)
class MeasuredRound:
    """A round whose rows did nothing else, times in microseconds."""

    batch: Batch
    choice: Choice
    fed: float
    """Tokens a row that its step computed."""
    gained: float
    """Tokens that a row got, in the mean."""
    step_us: float
    """Without solve_us, which a solve beside it took."""
    solve_us: float
    draft_us: float
    own_us: float
    usual: bool
    """As later rounds of its kind will be: no solve beside it, nothing compiled."""
