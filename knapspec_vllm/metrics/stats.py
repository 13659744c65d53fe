# SPDX-License-Identifier: Apache-2.0
"""Counters of one worker since its start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from knapspec_vllm.metrics.histogram import Histogram

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SOLVE_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RATIO_BOUNDS = (0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 2.0)
CONTEXT_BOUNDS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class StepCounts:
    """The fields of `Stats` that are counted where steps are scheduled."""

    clipped_rows: Counter[str]
    verify_steps: Counter[str]
    placeholder_tokens: int


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
    #: By position in the draft: scheduled, and accepted by verification.
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    #: Tokens drafted and kept, by the context length of their row: see `context_bucket`.
    drafted_by_context: Counter[str] = field(default_factory=Counter)
    accepted_by_context: Counter[str] = field(default_factory=Counter)
    solves: int = 0
    solve_seconds: Histogram = field(default_factory=lambda: Histogram(SOLVE_BOUNDS))
    #: Changes of what is drafted with: "start" and "stop" of drafting, or "plan", another one.
    plan_changes: Counter[str] = field(default_factory=Counter)
    #: Rows of rounds that drafted and of rounds that did not.
    drafting_rows: Histogram = field(default_factory=lambda: Histogram(BATCH_BOUNDS))
    declining_rows: Histogram = field(default_factory=lambda: Histogram(BATCH_BOUNDS))
    #: Rows that could not draft, or keep, the maximum, by reason: "slots", "max_model_len",
    #: "max_tokens", or "request", whose sender asked for fewer.
    clipped_rows: Counter[str] = field(default_factory=Counter)
    #: Draft rounds with captured steps and captures of them, by result: see `draft.graphs`.
    graphs: Counter[str] = field(default_factory=Counter)
    #: Verify steps that replayed one graph ("whole") or did not ("pieces"): `draft.verify_graphs`.
    verify_steps: Counter[str] = field(default_factory=Counter)
    #: Rounds that declined, by `Choice.code`.
    declined_rounds: Counter[str] = field(default_factory=Counter)

    #: Of the rounds that were measured (same rows, no prefill, no pause): how many, solves in
    #: them, and their time by phase. step: the engine's, from one proposal to the next; own: all
    #: else of ours; solve: of every solve, in whatever round.
    measured_rounds: int = 0
    measured_solve_us: float = 0.0
    phase_us: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("step", "draft", "own", "solve"), 0.0)
    )
    #: Of the same rounds, those with a solve left out: what they should have taken, and plain
    #: decoding for as many tokens; plain over round is the speedup that was predicted.
    predicted_round_us: float = 0.0
    predicted_plain_us: float = 0.0
    #: The same with what they took, and with the tokens they really gained; of rounds that
    #: declined, plain decoding is what they were.
    realised_round_us: float = 0.0
    realised_plain_us: float = 0.0
    #: What a round took over what it should have taken, of the same rounds.
    round_ratio: Histogram = field(default_factory=lambda: Histogram(RATIO_BOUNDS))

    def add_round(self, step_us: float, own_us: float, draft_us: float, solve_us: float) -> None:
        """One measured round."""
        self.measured_rounds += 1
        self.measured_solve_us += solve_us
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
        self.round_ratio.observe(time_us / round_us)
        self.realised_plain_us += plain_us

    def add_choice(self, rows: int, drafts: bool, declined: str) -> None:
        """A round of `rows` decoding rows; declined: why it did not draft."""
        self.rounds += 1
        (self.drafting_rows if drafts else self.declining_rows).observe(rows)
        if not drafts:
            self.declined_rounds[declined] += 1

    def add_solve(self, time_us: float, host_us: float) -> None:
        """host_us: of it, what the host waited for or queued; a GPU does the rest meanwhile."""
        self.solves += 1
        self.phase_us["solve"] += host_us
        self.solve_seconds.observe(time_us / 1e6)

    def add_verified(self, accepted: int, drafted: int, context: int) -> None:
        """One row with `context` tokens: `accepted` of `drafted` scheduled tokens were."""
        self.accepted_tokens += accepted
        bucket = context_bucket(context)
        self.drafted_by_context[bucket] += drafted
        self.accepted_by_context[bucket] += accepted
        for counts, number in (
            (self.drafted_by_position, drafted),
            (self.accepted_by_position, accepted),
        ):
            counts.extend([0] * (drafted - len(counts)))
            for position in range(number):
                counts[position] += 1

    def add_counts(self, counts: StepCounts) -> None:
        """Counted in another process."""
        self.clipped_rows.update(counts.clipped_rows)
        self.verify_steps.update(counts.verify_steps)
        self.placeholder_tokens += counts.placeholder_tokens

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = list(value)
            elif isinstance(value, dict):
                value = dict(value)
            elif isinstance(value, Histogram):
                value = value.as_dict()
            values[name] = value
        return values


def context_bucket(tokens: int) -> str:
    """Label of a context length: "0-1023", "1024-4095", up to "65536+"."""
    low = 0
    for bound in CONTEXT_BOUNDS:
        if tokens < bound:
            return f"{low}-{bound - 1}"
        low = bound
    return f"{low}+"
