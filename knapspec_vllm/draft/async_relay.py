# SPDX-License-Identifier: Apache-2.0
"""Asynchronous decisions where the scheduler has no worker in its process (tensor parallelism).

`Planning` stays with the workers, which hold the cost curves, the solver and the metrics. What the
scheduler asks it and tells it goes along with each step, and is attended to behind the step's
drafts; the answer comes back with the step's output. So what a step drafts was decided two steps
before it, for the batch of that time: a batch that has just changed drafts by the old one's
decision twice. What the last steps before a pause have shown goes along with the first after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.draft.async_planning import AsyncPlanning
from knapspec_vllm.draft.async_rounds import REPORT, ROUND, AsyncRound, Report
from knapspec_vllm.draft.engine import most_drafts
from knapspec_vllm.draft.observed import MeasuredRound, Verified
from knapspec_vllm.draft.references import Passages, Wanted
from knapspec_vllm.draft.verify_graphs import VerifyGraphs
from knapspec_vllm.metrics.stats import Stats, StepCounts
from knapspec_vllm.planner.types import Batch, Choice, Plan


class RelayedPlanning:
    """`Planning` of the workers: calls are kept for the next step, `choose` gives the last answer.

    Each public method without a result has one of the same name there.
    """

    solving_under_way = False
    """Known with a step's report."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answer = Choice(None, 0, 1.0, "no answer yet", "no plan")
        self._answered_rows = 0
        """Of the batch that the answer was for."""
        self._wants_passages = False

    def choose(
        self,
        batch: Batch,
        max_draft_length: int,
        references: Callable[[], Any],
        opted_out: bool = False,
    ) -> Choice:
        passages = references() if self._wants_passages else None
        self._call("choose", batch, max_draft_length, passages, opted_out)
        answer, length = self._answer, min(self._answer.draft_length, max_draft_length)
        if answer.plan is not None and length < 1:
            return Choice(None, 0, 1.0, "no room for a draft in this batch", "no room")
        if length == answer.draft_length and self._answered_rows == batch.rows:
            return answer
        return replace(answer, draft_length=length, round_us=0.0)  # nobody predicted it

    def feedback(self, plan: Plan, verified: Sequence[Verified], context: float) -> None:
        self._call("feedback", plan, verified, context)

    def observe_drafts(self, batch: Batch, plan: Plan, draft_length: int, time_us: float) -> None:
        self._call("observe_drafts", batch, plan, draft_length, time_us)

    def observe_round(self, measured: MeasuredRound) -> None:
        self._call("observe_round", measured)

    def count(self, counts: StepCounts) -> None:
        self._call("count", counts)

    def take_calls(self) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        """Since the last time."""
        calls, self._calls = tuple(self._calls), []
        return calls

    def answered(self, report: Report, rows: int) -> None:
        """rows: of the batch that was asked for."""
        self._wants_passages = report.wants_passages
        # Rows about to end say nothing of the next batch, which is asked for two steps later.
        if report.choice is not None and report.choice.code not in ("no room", "opted out"):
            self._answer, self._answered_rows = report.choice, rows

    def _call(self, name: str, *arguments: Any) -> None:
        self._calls.append((name, arguments))


@dataclass(frozen=True)
class _Limits:
    max_model_len: int
    scheduler_config: Any

    def most_drafts(self, rows: int) -> int:
        return most_drafts(self.scheduler_config, rows)


class RelayHost:
    """The `Host` of a scheduler whose workers are elsewhere."""

    def __init__(self, vllm_config: Any, max_model_len: int) -> None:
        config = KnapSpecConfig.from_vllm_config(vllm_config)
        self.num_speculative_tokens: int = vllm_config.speculative_config.num_speculative_tokens
        self.stats = Stats()
        #: Shapes come with reports.
        self.verify_graphs = VerifyGraphs(self.num_speculative_tokens, draft_graphs=0)
        self.limits = _Limits(max_model_len, vllm_config.scheduler_config)
        self.planner = RelayedPlanning(
            Wanted.of(
                config,
                config.reference_tokens * config.reference_rows,
                vllm_config.device_config.device_type,
                max_model_len,
            )
        )

    def knows(self, req_id: str) -> bool:
        """The step that the tokens go along with has every row."""
        return True

    def references(self, passages: Passages) -> Passages:
        return passages

    def take_counts(self) -> StepCounts | None:
        """Since the last time, if there are any."""
        stats = self.stats
        if not (stats.clipped_rows or stats.verify_steps or stats.placeholder_tokens):
            return None
        self.stats = Stats()
        return StepCounts(stats.clipped_rows, stats.verify_steps, stats.placeholder_tokens)


class RelayedAsyncPlanning(AsyncPlanning):
    """`AsyncPlanning` whose questions travel with the steps, and answers with their outputs."""

    def __init__(self, host: RelayHost) -> None:
        super().__init__(host)
        self._relay = host

    def decide(self, scheduler: Any, scheduler_output: Any) -> None:
        super().decide(scheduler, scheduler_output)
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        if found is not None:
            if counts := self._relay.take_counts():
                self._relay.planner.count(counts)
            found.calls = self._relay.planner.take_calls()

    def learn(self, scheduler: Any, scheduler_output: Any, output: Any) -> None:
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        report: Report | None = getattr(output, REPORT, None)
        if found is not None and report is not None:
            found.times = report.times
            self._relay.verify_graphs.shapes = report.captured
            decision = found.decides
            if decision is not None:
                decision.settled = report.settled
                decision.solving |= report.solving
                decision.own_us += report.own_us
            self._relay.planner.answered(report, 0 if decision is None else decision.batch.rows)
        super().learn(scheduler, scheduler_output, output)
