# SPDX-License-Identifier: Apache-2.0
"""Decides what the rows of a step draft when vLLM schedules it, and learns from results.

The host knows each request up to the step before the last. A decision is about batches and not
about tokens, so it loses little: contexts are a few tokens short, and rows are taken to have room
that they may have used up. What rounds take is read off the device's own clock, where the host is
behind: a step from the drafts before it to its sampled tokens, drafts from there on.

In the scheduler's process. That is the worker's too, or calls of `Planning` are relayed to it
(`async_relay`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from knapspec_vllm.draft.async_rounds import ROUND, AsyncRound, Decision, Timing
from knapspec_vllm.draft.observed import MeasuredRound, Verified
from knapspec_vllm.draft.references import Passages, References, Wanted, newest_passages
from knapspec_vllm.draft.round_clock import interrupted
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.draft.runner_rows import Limits, of_scheduler
from knapspec_vllm.draft.verify_graphs import VerifyGraphs
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner.types import Batch, Choice, Plan

_MOST_ROWS = 0.75
"""Share of a batch's rows that draft in a round that shows what its drafts take."""


class Planner(Protocol):
    """What is asked of `Planning`."""

    @property
    def wanted(self) -> Wanted: ...
    @property
    def solving_under_way(self) -> bool: ...
    def choose(
        self,
        batch: Batch,
        max_draft_length: int,
        references: Callable[[], Any],
        opted_out: bool = False,
    ) -> Choice: ...
    def feedback(self, plan: Plan, verified: Sequence[Verified], context: float) -> None: ...
    def observe_drafts(
        self, batch: Batch, plan: Plan, draft_length: int, time_us: float
    ) -> None: ...
    def observe_round(self, measured: MeasuredRound) -> None: ...


class Host(Protocol):
    """What a scheduler's process has of one engine."""

    num_speculative_tokens: int
    stats: Stats
    verify_graphs: VerifyGraphs

    @property
    def planner(self) -> Planner: ...
    @property
    def limits(self) -> Limits: ...
    def knows(self, req_id: str) -> bool:
        """Whether the request has been in a step of the worker."""

    def references(self, passages: Passages) -> References | Passages | None:
        """What `choose` takes for them."""


class AsyncPlanning:
    """One engine's decisions, which its scheduler asks for.

    Steps come in order: a step's decision, its sampled tokens, its drafts, and at some time after
    them its results.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._number = 0
        #: Of the step scheduled last.
        self._decided: Decision | None = None
        self._doubted = 0

    def decide(self, scheduler: Any, scheduler_output: Any) -> None:
        """Before vLLM has moved its requests on: how many tokens the step's rows draft."""
        if not scheduler_output.num_scheduled_tokens:
            return  # no step: what was decided last is still to be verified
        started = time.perf_counter()
        self._number += 1
        found = AsyncRound(self._number, self._decided)
        setattr(scheduler_output, ROUND, found)
        rows = []
        for req_id, count in scheduler_output.num_scheduled_tokens.items():
            request = scheduler.requests[req_id]
            computed = request.num_computed_tokens + count
            if computed >= request.num_tokens + request.num_output_placeholders:
                rows.append((request, computed))
        found.decides = self._decided = self._decision(rows, started) if rows else None
        length = 0 if self._decided is None else self._decided.draft_length
        scheduler_output.num_spec_tokens_to_schedule = length

    def cap(self, scheduler: Any, scheduler_output: Any) -> None:
        """After vLLM has given every row as many placeholders: fewer for those that want fewer."""
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        decision = None if found is None else found.decides
        if decision is None:
            return
        for req_id, limit in decision.limits.items():
            if limit < decision.draft_length:
                scheduler.requests[req_id].spec_token_ids = [-1] * limit

    def learn(self, scheduler: Any, scheduler_output: Any, output: Any) -> None:
        """Before vLLM has taken a step's results in: acceptance, and what the round took."""
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        if found is None:
            return
        self._host.verify_graphs.count(scheduler_output, self._host.stats)
        gained = self._feedback(scheduler, scheduler_output, output, found)
        if found.times is None:
            return
        times = found.times.read()
        self._learn_drafts(scheduler_output, found, times.draft_us)
        self._learn_round(scheduler_output, found, gained, times)

    def _decision(self, rows: list[tuple[Any, int]], started: float) -> Decision:
        """rows: requests, and up to where their step computes them at most."""
        host, planner, stats = self._host, self._host.planner, self._host.stats
        candidates = of_scheduler(rows, host.limits, host.num_speculative_tokens, stats)
        batch = Batch(len(rows), candidates.context_tokens, candidates.room)
        solved_us = stats.phase_us["solve"]
        choice = planner.choose(
            batch,
            max(candidates.limits),
            lambda: self._references([request for request, _ in rows], candidates),
            candidates.opted_out == len(rows),
        )
        solve_us = stats.phase_us["solve"] - solved_us
        length = 0 if choice.plan is None else choice.draft_length
        lengths = host.verify_graphs.lengths(candidates, length)
        return Decision(
            choice=choice,
            batch=batch,
            limits=dict(zip(candidates.req_ids, lengths, strict=True)),
            longest=max(computed for _, computed in rows) + 1 + length,
            solving=solve_us > 0 or planner.solving_under_way,
            own_us=max(0.0, (time.perf_counter() - started) * 1e6 - solve_us),
        )

    def _references(self, requests: list[Any], rows: Candidates) -> References | Passages | None:
        """Of the rows that have been in a step, of what is known for certain: the newest known
        token may have been sampled in a step that is still computed, and a block table reaches as
        far as the last step did."""
        known = [i for i, req_id in enumerate(rows.req_ids) if self._host.knows(req_id)]
        certain = Candidates(
            index=[],
            req_ids=[rows.req_ids[i] for i in known],
            tokens=[],
            positions=[rows.positions[i] - 1 for i in known],
            bounds=[],
            left=[],
        )
        passages = newest_passages(
            certain,
            lambda i, start, stop: requests[known[i]].all_token_ids[start:stop],
            self._host.planner.wanted,
        )
        return None if passages is None else self._host.references(passages)

    def _feedback(
        self, scheduler: Any, scheduler_output: Any, output: Any, found: AsyncRound
    ) -> int:
        """Acceptance of what the step verified; returns how many tokens its rows got."""
        host, last = self._host, found.verifies
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        gained, verified = 0, []
        for req_id, place in output.req_id_to_index.items():
            tokens = output.sampled_token_ids[place] if output.sampled_token_ids else []
            request = scheduler.requests.get(req_id)
            # Of what is beyond max_tokens vLLM keeps none. (Nor of what is behind a stop token.)
            if request is not None and not request.is_finished():
                gained += min(len(tokens), request.max_tokens - request.num_output_tokens)
            count = len(scheduled.get(req_id, ()))
            if not count:
                continue
            drafted = 0 if last is None else last.limits.get(req_id, 0)
            if last is None or last.choice.plan is None or not drafted:
                host.stats.placeholder_tokens += count
                continue
            if request is None or not tokens:
                continue
            free = not request.use_structured_output
            accepted = min(len(tokens) - 1, count)
            verified.append(Verified(accepted, count, request.num_tokens, free))
        if verified:
            assert last is not None
            assert last.choice.plan is not None
            host.planner.feedback(last.choice.plan, verified, last.batch.context_per_row)
        return gained

    def _learn_drafts(self, scheduler_output: Any, found: AsyncRound, time_us: float) -> None:
        """Teaches where most rows drafted, behind a step of theirs: a prompt's hides launches."""
        decision = found.decides
        if decision is None:
            return
        decision.draft_us = time_us if decision.draft_length else 0.0
        plan, usual = decision.choice.plan, decision.settled and not decision.solving
        tokens, most = scheduler_output.num_scheduled_tokens, self._host.num_speculative_tokens
        alone = tokens.keys() == decision.limits.keys()
        usual &= alone and all(number <= 1 + most for number in tokens.values())
        usual &= sum(map(bool, decision.limits.values())) >= _MOST_ROWS * decision.batch.rows
        if plan is not None and decision.draft_length and usual:
            self._host.planner.observe_drafts(decision.batch, plan, decision.draft_length, time_us)

    def _learn_round(
        self, scheduler_output: Any, found: AsyncRound, gained: int, times: Timing
    ) -> None:
        """What the step took, if it had the rows of the last decision and no others."""
        last = found.verifies
        tokens = scheduler_output.num_scheduled_tokens
        if last is None or times.step_us is None or tokens.keys() != last.limits.keys():
            return
        drafted = sum(last.limits.values())
        if sum(tokens.values()) != drafted + len(tokens):
            return
        round_us = last.draft_us + times.step_us
        self._doubted, stop = interrupted(last.choice.round_us, round_us, self._doubted)
        if stop:
            return
        # A solve that this step's decision started runs before the step does.
        solving = last.solving or (found.decides is not None and found.decides.solving)
        self._host.planner.observe_round(
            MeasuredRound(
                batch=last.batch,
                choice=last.choice,
                fed=1 + drafted / len(tokens),
                gained=gained / len(tokens),
                step_us=times.step_us,
                draft_us=last.draft_us,
                own_us=last.own_us,
                solve_us=times.solve_us,
                usual=last.settled and not solving,
            )
        )
