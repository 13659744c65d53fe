# SPDX-License-Identifier: Apache-2.0
"""Decides what the rows of a step draft when vLLM schedules it, and learns from results.

The host knows each request up to the step before the last. A decision is about batches and not
about tokens, so it loses little: contexts are a few tokens short, and rows are taken to have room
that they may have used up. What rounds take is read off the device's own clock, where the host is
behind: a step from the drafts before it to its sampled tokens, drafts from there on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from knapspec_vllm.draft.async_rounds import (
    ROUND,
    AsyncRound,
    Decision,
    Sampled,
    between_us,
    draft,
    mark,
)
from knapspec_vllm.draft.planning import Verified
from knapspec_vllm.draft.references import References, newest_references
from knapspec_vllm.draft.round_clock import interrupted
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.draft.runner_rows import of_scheduler
from knapspec_vllm.planner.types import Batch

if TYPE_CHECKING:
    from knapspec_vllm.draft.proposer import KnapSpecProposer


_MOST_ROWS = 0.75
"""Share of a batch's rows that draft in a round that shows what its drafts take."""


class AsyncPlanning:
    """One engine's decisions, which its scheduler asks for, and its drafts, which its runner does.

    They share a process, and steps come in order: a step's decision, its sampled tokens, its
    drafts, and at some time after them its results.
    """

    def __init__(self, proposer: KnapSpecProposer, runner: Any) -> None:
        """runner: vLLM's V1 runner, whose rows these are."""
        self._proposer, self._runner = proposer, runner
        self._number = 0
        #: Of the step whose tokens were sampled last.
        self._sampled: Sampled | None = None
        #: Of the step scheduled last.
        self._decided: Decision | None = None
        #: Whose result came last.
        self._last: AsyncRound | None = None
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

    def stood_still(self) -> None:
        """See `KnapSpecProposer`: the step scheduled next does not follow the last one in time."""
        self._number += 1

    def cap(self, scheduler: Any, scheduler_output: Any) -> None:
        """After vLLM has given every row as many placeholders: fewer for those that want fewer."""
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        decision = None if found is None else found.decides
        if decision is None:
            return
        for req_id, limit in decision.limits.items():
            if limit < decision.draft_length:
                scheduler.requests[req_id].spec_token_ids = [-1] * limit

    def sampled(self, token_ids: torch.Tensor, scheduler_output: Any) -> None:
        """The runner's step has been sampled: [B, up to 1 + draft length], still on the device."""
        runner = self._runner
        discarded = runner.discard_request_mask.gpu[: len(token_ids)]
        self._sampled = Sampled(token_ids, discarded, runner.input_batch.vocab_size)
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        if found is not None:
            found.sampled = mark(token_ids.device)

    def publish(self) -> None:
        """Give vLLM the step's newest tokens, which its own bookkeeping needs."""
        assert self._sampled is not None
        self._runner._copy_valid_sampled_token_count(self._sampled.newest, self._sampled.counts)

    def propose(self, scheduler_output: Any, common_attn_metadata: Any) -> torch.Tensor:
        """Drafts [B, num_speculative_tokens] int32 of the runner's rows."""
        assert self._sampled is not None
        req_ids = self._runner.input_batch.req_ids
        drafts = draft(
            self._proposer,
            scheduler_output,
            self._sampled,
            req_ids,
            common_attn_metadata.seq_lens[: len(req_ids)],
            common_attn_metadata.block_table_tensor,
        )
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        if found is not None:
            found.drafted = mark(drafts.device)
        return drafts

    def learn(self, scheduler: Any, scheduler_output: Any, output: Any) -> None:
        """Before vLLM has taken a step's results in: acceptance, and what the round took."""
        found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
        if found is None:
            return
        before, self._last = self._last, found
        self._proposer.count_verified(scheduler_output)
        gained = self._feedback(scheduler, scheduler_output, output, found)
        if found.sampled is None or found.drafted is None:
            return  # no row was sampled
        self._learn_drafts(scheduler_output, found, between_us(found.sampled, found.drafted))
        if before is None or before.number != found.number - 1 or before.drafted is None:
            return
        self._learn_step(scheduler_output, found, gained, between_us(before.drafted, found.sampled))

    def _decision(self, rows: list[tuple[Any, int]], started: float) -> Decision:
        """rows: requests, and up to where their step computes them at most."""
        proposer = self._proposer
        planning, stats, engine = proposer.planning, proposer.stats, proposer.engine
        assert planning is not None
        assert engine is not None
        candidates = of_scheduler(rows, engine, proposer.num_speculative_tokens, stats)
        batch = Batch(len(rows), candidates.context_tokens, candidates.room)
        solved_us = stats.phase_us["solve"]
        choice = planning.choose(
            batch,
            max(candidates.limits),
            lambda: self._references([request for request, _ in rows], candidates),
            candidates.opted_out == len(rows),
        )
        solve_us = stats.phase_us["solve"] - solved_us
        length = 0 if choice.plan is None else choice.draft_length
        lengths = proposer.verify_graphs.lengths(candidates, length)
        return Decision(
            choice=choice,
            batch=batch,
            limits=dict(zip(candidates.req_ids, lengths, strict=True)),
            longest=max(computed for _, computed in rows) + 1 + length,
            solving=solve_us > 0 or planning.solving.under_way,
            own_us=max(0.0, (time.perf_counter() - started) * 1e6 - solve_us),
        )

    def _references(self, requests: list[Any], candidates: Candidates) -> References | None:
        """Of the rows that have been in a step, by the block tables they had there."""
        proposer, batch = self._proposer, self._runner.input_batch
        assert proposer.engine is not None
        assert proposer.planning is not None
        places = batch.req_id_to_index
        known = [i for i, req_id in enumerate(candidates.req_ids) if req_id in places]
        rows = Candidates(
            index=[places[candidates.req_ids[i]] for i in known],
            req_ids=[candidates.req_ids[i] for i in known],
            tokens=[],
            # The newest known token may have been sampled in a step that is still computed, and
            # a block table reaches as far as the last step did.
            positions=[candidates.positions[i] - 1 for i in known],
            bounds=[],
            left=[],
        )
        by_place = {places[candidates.req_ids[i]]: requests[i] for i in known}
        config, table = proposer.config, batch.block_table[0].get_device_tensor(len(places))
        return newest_references(
            proposer.engine,
            rows,
            _Known(by_place),
            table,
            proposer.planning.reference_tokens,
            config.reference_rows,
            config.reference_tokens,
        )

    def _feedback(
        self, scheduler: Any, scheduler_output: Any, output: Any, found: AsyncRound
    ) -> int:
        """Acceptance of what the step verified; returns how many tokens its rows got."""
        proposer, last = self._proposer, found.verifies
        assert proposer.planning is not None
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
                proposer.stats.placeholder_tokens += count
                continue
            if request is None or not tokens:
                continue
            free = not request.use_structured_output
            accepted = min(len(tokens) - 1, count)
            verified.append(Verified(accepted, count, request.num_tokens, free))
        if verified:
            assert last is not None
            assert last.choice.plan is not None
            proposer.planning.feedback(last.choice.plan, verified, last.batch.context_per_row)
        return gained

    def _learn_drafts(self, scheduler_output: Any, found: AsyncRound, time_us: float) -> None:
        """Teaches where most rows drafted, behind a step of theirs: a prompt's hides launches."""
        decision, policy = found.decides, self._proposer.planning.policy  # type: ignore[union-attr]
        if decision is None:
            return
        decision.draft_us = time_us if decision.draft_length else 0.0
        plan, usual = decision.choice.plan, decision.settled and not decision.solving
        tokens, most = scheduler_output.num_scheduled_tokens, self._proposer.num_speculative_tokens
        alone = tokens.keys() == decision.limits.keys()
        usual &= alone and all(number <= 1 + most for number in tokens.values())
        usual &= sum(map(bool, decision.limits.values())) >= _MOST_ROWS * decision.batch.rows
        if policy is not None and plan is not None and decision.draft_length and usual:
            policy.observe_draft(decision.batch, plan, decision.draft_length, time_us)

    def _learn_step(
        self, scheduler_output: Any, found: AsyncRound, gained: int, time_us: float
    ) -> None:
        """What the step took, if it had the rows of the last decision and no others."""
        last, policy = found.verifies, self._proposer.planning.policy  # type: ignore[union-attr]
        tokens = scheduler_output.num_scheduled_tokens
        if last is None or tokens.keys() != last.limits.keys():
            return
        drafted = sum(last.limits.values())
        if sum(tokens.values()) != drafted + len(tokens):
            return
        round_us = last.draft_us + time_us
        self._doubted, stop = interrupted(last.choice.round_us, round_us, self._doubted)
        if stop:
            return
        stats, batch, choice = self._proposer.stats, last.batch, last.choice
        stats.add_round(time_us, last.own_us, last.draft_us, 0.0)
        # A solve that this step's decision started runs before the step does.
        solving = last.solving or (found.decides is not None and found.decides.solving)
        if policy is None or solving or not last.settled:
            return
        policy.observe_step(batch, 1 + drafted / len(tokens), time_us)
        plain_us = round_us  # of a round that declined
        if choice.plan is not None:
            plain_us = gained / len(tokens) * policy.plain_us(batch)
        stats.add_prediction(choice.predicted_speedup, choice.round_us, plain_us, round_us)


class _Known:
    """Tokens of the runner's rows as the scheduler knows them: `known[row, start:stop]`."""

    def __init__(self, requests: dict[int, Any]) -> None:
        self._requests = requests

    def __getitem__(self, where: tuple[int, slice]) -> np.ndarray:
        row, part = where
        return np.asarray(self._requests[row].all_token_ids[part], dtype=np.int64)
