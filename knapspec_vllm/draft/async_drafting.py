# SPDX-License-Identifier: Apache-2.0
"""The worker's side of asynchronous scheduling: drafts behind a step, as its scheduler decided.

Where that is in another process, its questions and what it has learned come with a step
(`AsyncRound.calls`). They are attended to when the step's drafts are queued and the device is busy,
by every rank in the same order, and the answer goes back with the step's output.
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
from knapspec_vllm.planner.types import Choice

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
        self._report: Report | None = None
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
        if found is not None:
            before = self._drafted
            follows = before is not None and before[0] == found.number - 1
            found.times = Marks(
                before[1] if follows and before is not None else None,
                self._sampled_at,
                mark(drafts.device),
            )
            self._drafted = found.number, found.times.drafted
            if found.calls is not None:
                self._report = self._answer(found, found.times)
        return drafts

    def reported(self, output: Any) -> Any:
        """vLLM's output of the step that has just been queued, which will bring its report."""
        report, self._report = self._report, None
        if report is None:
            return output
        get_output = output.get_output

        def with_report() -> Any:
            """In a thread that waits for the step."""
            result = get_output()
            setattr(result, REPORT, report.arrived())
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
        index = [places[req_id] for req_id in passages.req_ids]
        return passages.on_device(self.limits, index, table)

    def _answer(self, found: AsyncRound, times: Marks) -> Report:
        """Does what the scheduler asks for."""
        planning, stats, started = self.planner, self.stats, time.perf_counter()
        choice: Choice | None = None
        wanted = False
        solved_us = stats.phase_us["solve"]
        for name, arguments in found.calls or ():
            if name != "choose":
                getattr(planning, name)(*arguments)
                continue
            batch, most, passages, opted_out = arguments

            def references(passages: Passages | None = passages) -> References | None:
                nonlocal wanted
                wanted = passages is None
                return None if passages is None else self.references(passages)

            choice = planning.choose(batch, most, references, opted_out)
        solve_us = stats.phase_us["solve"] - solved_us
        return Report(
            choice=choice,
            wants_passages=wanted,
            solving=solve_us > 0 or planning.solving_under_way,
            settled=found.decides is None or found.decides.settled,
            own_us=max(0.0, (time.perf_counter() - started) * 1e6 - solve_us),
            captured=self.verify_graphs.shapes,
            times=times,
        )
