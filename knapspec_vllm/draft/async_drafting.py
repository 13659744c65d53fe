# SPDX-License-Identifier: Apache-2.0
"""The worker's side of asynchronous scheduling: drafts behind a step, as its scheduler decided.

Where that is in another process, its questions and what it has learned come with a step
(`AsyncRound.calls`). Every rank attends to them in the same order, when the step, its drafts and
the copy of its results are queued (a solve would hold that up), and the first one's answer goes
back with the step's output.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from knapspec_vllm.draft.async_rounds import (
    REPORT,
    ROUND,
    AsyncRound,
    Mark,
    Marks,
    Report,
    Sampled,
    draft,
    mark,
)
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.planning import Planning
from knapspec_vllm.draft.references import Passages, References
from knapspec_vllm.planner.types import Batch, Choice

if TYPE_CHECKING:
    from knapspec_vllm.draft.proposer import KnapSpecProposer


class AsyncDrafting:
    """One runner's drafts. Steps come in order: sampled tokens, then drafts.

    To a scheduler in the same process it is the `Host` of its decisions.
    """

    def __init__(self, proposer: KnapSpecProposer, runner: Any) -> None:
        """runner: vLLM's V1 runner, whose rows these are."""
        self._proposer, self._runner = proposer, runner
        #: Of the step whose tokens were sampled last.
        self._sampled: Sampled | None = None
        self._sampled_at: Mark | None = None
        #: Number of the last step that drafted, or might have, and when it had.
        self._drafted: tuple[int, Mark] | None = None
        #: Of the step that has just been queued: what is asked, and its times.
        self._asked: tuple[AsyncRound, Marks] | None = None
        self.num_speculative_tokens = proposer.num_speculative_tokens
        self.stats, self.verify_graphs = proposer.stats, proposer.verify_graphs

    @property
    def planner(self) -> Planning:
        return self._proposer.planner

    @property
    def limits(self) -> Engine:
        assert self._proposer.engine is not None
        return self._proposer.engine

    def stood_still(self) -> None:
        """See `KnapSpecProposer`: the next step does not follow the last one in time."""
        self._drafted = None

    def sampled(self, token_ids: torch.Tensor) -> None:
        """The runner's step has been sampled: [B, up to 1 + draft length], still on the device."""
        runner = self._runner
        discarded = runner.discard_request_mask.gpu[: len(token_ids)]
        self._sampled = Sampled(token_ids, discarded, runner.input_batch.vocab_size)
        self._sampled_at = mark(token_ids.device)

    def publish(self) -> None:
        """Give vLLM the step's newest tokens, which its own bookkeeping needs."""
        assert self._sampled is not None
        self._runner._copy_valid_sampled_token_count(self._sampled.newest, self._sampled.counts)

    def propose(self, scheduler_output: Any, common_attn_metadata: Any) -> torch.Tensor:
        """Drafts [B, num_speculative_tokens] int32 of the runner's rows."""
        assert self._sampled is not None
        assert self._sampled_at is not None
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
        solve = self.planner.solving.take_started()
        if found is not None:
            before = self._drafted
            follows = before is not None and before[0] == found.number - 1
            found.times = Marks(
                before[1] if follows and before is not None else None,
                self._sampled_at,
                mark(drafts.device),
                solve,
            )
            self._drafted = found.number, found.times.drafted
            if found.calls is not None:
                self._asked = found, found.times
        return drafts

    def reported(self, output: Any) -> Any:
        """vLLM's output of the step that has just been queued; the first rank's will bring a report
        to a scheduler in another process."""
        asked, self._asked = self._asked, None
        if asked is None:
            return output
        report = self._answer(*asked)
        if not self._proposer.agreement.leads:
            return output  # nobody reads it
        get_output = output.get_output

        def with_report() -> Any:
            """In a thread that waits for the step."""
            result = get_output()
            setattr(result, REPORT, report.arrived())
            del output.get_output  # or they refer to each other
            return result

        output.get_output = with_report
        return output

    def knows(self, req_id: str) -> bool:
        return req_id in self._runner.input_batch.req_id_to_index

    def references(self, passages: Passages) -> References | None:
        """Of rows of the runner's batch, by the block tables of their last step."""
        batch = self._runner.input_batch
        places = batch.req_id_to_index
        table = batch.block_table[0].get_device_tensor(len(places))
        return passages.on_device(self.limits, places, table)

    def _answer(self, found: AsyncRound, times: Marks) -> Report:
        """Does what the scheduler asks for."""
        planning, stats, started = self.planner, self.stats, time.perf_counter()
        choice: Choice | None = None
        solved_us = stats.phase_us["solve"]
        for name, arguments in found.calls or ():
            if name == "choose":
                choice = self._choose(*arguments)
            else:
                getattr(planning, name)(*arguments)
        solve_us = stats.phase_us["solve"] - solved_us
        return Report(
            choice=choice,
            wants_passages=planning.solving.lacks_references and bool(self.limits.paged_kv),
            solving=solve_us > 0 or planning.solving_under_way,
            settled=found.decides is None or found.decides.settled,
            own_us=max(0.0, (time.perf_counter() - started) * 1e6 - solve_us),
            captured=self.verify_graphs.shapes,
            times=times,
        )

    def _choose(
        self, batch: Batch, most: int, passages: Passages | None, opted_out: bool
    ) -> Choice:
        if passages is None:
            return self.planner.choose(batch, most, lambda: None, opted_out)
        self.planner.look_again()  # a solve has been waiting for them
        return self.planner.choose(batch, most, lambda: self.references(passages), opted_out)
