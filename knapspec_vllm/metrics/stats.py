# SPDX-License-Identifier: Apache-2.0
"""Counters of one worker since its start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Plain counters, never decreasing; times in microseconds."""

    #: Rounds with at least one decoding row.
    rounds: int = 0
    #: Rounds that drafted.
    drafting_rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    #: Placeholders that vLLM schedules as drafts of its own for prompts that are fully cached; its
    #: spec_decode metrics count them as drafted.
    placeholder_tokens: int = 0
    #: By position in the draft: scheduled, and kept by verification.
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    solves: int = 0
    solve_us: float = 0.0
    plan_changes: int = 0
    #: Rows that could not draft the maximum, by reason: "slots", "max_model_len", "max_tokens".
    clipped_rows: Counter[str] = field(default_factory=Counter)
    #: Rounds that declined, by `Choice.code`.
    declined_rounds: Counter[str] = field(default_factory=Counter)

    #: Of the rounds that were measured (an unchanged set of rows, no prefill): how many, and their
    #: time by phase. step: the engine's, from one proposal to the next; own: all else of ours.
    measured_rounds: int = 0
    phase_us: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("step", "draft", "own", "solve"), 0.0)
    )
    #: Of the same rounds: what they should have taken, and plain decoding for as many tokens;
    #: plain over round is the speedup that was predicted.
    predicted_round_us: float = 0.0
    predicted_plain_us: float = 0.0
    #: The same with what they took, and with the tokens they really gained.
    realised_round_us: float = 0.0
    realised_plain_us: float = 0.0

    def add_round(self, step_us: float, own_us: float, draft_us: float) -> None:
        """One measured round."""
        self.measured_rounds += 1
        for name, time_us in (("step", step_us), ("own", own_us), ("draft", draft_us)):
            self.phase_us[name] += time_us

    def add_prediction(
        self, speedup: float, round_us: float, plain_us: float, time_us: float
    ) -> None:
        """Predicted speedup and time of a measured round; plain decoding for its tokens; its time.

        Rounds that nobody could predict (no cost curves) are left out.
        """
        if round_us <= 0:
            return
        self.predicted_round_us += round_us
        self.predicted_plain_us += speedup * round_us
        self.realised_round_us += time_us
        self.realised_plain_us += plain_us

    def add_verified(self, accepted: int, drafted: int) -> None:
        """One row: `accepted` of `drafted` scheduled tokens were kept."""
        self.accepted_tokens += accepted
        for counts, number in (
            (self.drafted_by_position, drafted),
            (self.accepted_by_position, accepted),
        ):
            counts.extend([0] * (drafted - len(counts)))
            for position in range(number):
                counts[position] += 1

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = list(value)
            elif isinstance(value, dict):
                value = dict(value)
            values[name] = value
        return values
