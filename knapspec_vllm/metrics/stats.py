# SPDX-License-Identifier: Apache-2.0
"""Counters of one worker since its start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Plain counters; times in microseconds."""

    #: Rounds with at least one decoding row.
    rounds: int = 0
    #: Rounds that drafted.
    drafting_rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    #: Placeholders that vLLM schedules as drafts of its own for prompts that are fully cached; its
    #: spec_decode metrics count them as drafted.
    placeholder_tokens: int = 0
    draft_us: float = 0.0
    solves: int = 0
    solve_us: float = 0.0
    plan_changes: int = 0
    #: Rows that could not draft the maximum, by reason: "slots", "max_model_len", "max_tokens".
    clipped_rows: Counter[str] = field(default_factory=Counter)
    #: Rounds that declined, by `Choice.code`.
    declined_rounds: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        values = dict(vars(self))
        values["clipped_rows"] = dict(self.clipped_rows)
        values["declined_rounds"] = dict(self.declined_rounds)
        return values
