# SPDX-License-Identifier: Apache-2.0
"""Rounds under asynchronous scheduling: drafted without the host ever waiting for the device.

vLLM schedules a step while the one before it is computed. So what a round drafts is decided when
its step is scheduled (`async_planning`) and goes along with the step's output; here, when the
step's tokens have been sampled and nobody on the host knows them, drafts are queued from tensors
alone. Every row drafts as many tokens as vLLM has scheduled placeholders for; those of rows that
drafted fewer hold token 0, and verification drops them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.planner.types import Batch, Choice

if TYPE_CHECKING:
    from knapspec_vllm.draft.proposer import KnapSpecProposer

#: Of SchedulerOutput: the step's `AsyncRound`.
ROUND = "knapspec_round"
#: Of ModelRunnerOutput: the step's `Report`, if its scheduler is in another process.
REPORT = "knapspec_report"

Mark: TypeAlias = "torch.Event | float"
"""A moment: of the device's stream, or on a CPU of its clock, in seconds."""


@dataclass
class Decision:
    """What the rows of a step draft once their tokens are sampled."""

    choice: Choice
    batch: Batch
    #: Decoding requests -> tokens that each may draft, at most the choice's draft length.
    limits: dict[str, int]
    #: Upper bound of any row's length after it.
    longest: int
    #: A solve was started with it, or is not over yet.
    solving: bool
    #: Host time it took, microseconds, without solving.
    own_us: float
    #: Its drafts ran as later ones of their kind will; known once they are queued.
    settled: bool = True
    #: What its drafts took, microseconds; known with the result of its step.
    draft_us: float = 0.0

    @property
    def draft_length(self) -> int:
        return 0 if self.choice.plan is None else self.choice.draft_length


class TimedSolve(Protocol):
    @property
    def time_us(self) -> float:
        """What it took the device, once it is over."""


@dataclass
class Timing:
    """What a step's parts took on the device, microseconds."""

    #: From the drafts of the step before it to its sampled tokens; None where that one is unknown,
    #: or the engine stood still between them.
    step_us: float | None
    #: From there until its rows had drafted.
    draft_us: float
    #: Of a solve that ran before the step; not part of step_us.
    solve_us: float = 0.0

    def read(self) -> Timing:
        return self


@dataclass
class Marks:
    """The same as moments, which may not have passed yet."""

    before: Mark | None
    sampled: Mark
    drafted: Mark
    #: Queued between `before` and `sampled`.
    solve: TimedSolve | None = None

    def read(self) -> Timing:
        """Once they have passed."""
        step_us = None if self.before is None else between_us(self.before, self.sampled)
        solve_us = 0.0 if self.solve is None else self.solve.time_us
        if step_us is not None:
            step_us = max(0.0, step_us - solve_us)
        return Timing(step_us, between_us(self.sampled, self.drafted), solve_us)


@dataclass
class AsyncRound:
    """A scheduled step: what it verifies was decided with the step before it."""

    number: int
    verifies: Decision | None
    decides: Decision | None = None
    #: None where no row was sampled.
    times: Marks | Timing | None = None
    #: What the scheduler of another process asks of the workers: methods of `Planning` and their
    #: arguments. None where they share a process.
    calls: tuple[tuple[str, tuple[Any, ...]], ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Workers have verified it by what is scheduled; a plan of 180 modes need not travel twice.
        return {**vars(self), "verifies": None}


@dataclass
class Report:
    """What a worker answers to `AsyncRound.calls`, along with the step's output."""

    #: To the question what to draft; None if nobody asked.
    choice: Choice | None
    #: A solve is due, for which workers lack the rows' newest tokens on the host.
    wants_passages: bool
    #: A solve was started, or is under way.
    solving: bool
    #: See `Decision`.
    settled: bool
    #: Host time of the answer, microseconds, without solving.
    own_us: float
    #: See `VerifyGraphs.shapes`.
    captured: dict[int, tuple[int, ...]]
    times: Marks | Timing

    def arrived(self) -> Report:
        """As it can be sent to another process, once the device is done with the step."""
        self.times = self.times.read()
        return self


def mark(device: torch.device) -> Mark:
    """Now, as far as what has been queued is concerned."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device.type, enable_timing=True)
    event.record()
    return event


def between_us(start: Mark, end: Mark) -> float:
    """Microseconds between two moments that have passed."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return (end - start) * 1e6
    return float(start.elapsed_time(end)) * 1e3


class Sampled:
    """The newest tokens of a step, on the device."""

    def __init__(
        self,
        # [B, up to 1 + draft length], -1 behind a row's last valid token
        token_ids: torch.Tensor,
        # [B] bool: rows whose token is not wanted, in the middle of a prompt
        discarded: torch.Tensor,
        vocabulary: int,
    ) -> None:
        if token_ids.shape[1] == 1:  # nothing was verified: a third of the launches
            counts, newest = (~discarded).to(torch.int32), token_ids[:, 0]
        else:
            valid = (token_ids >= 0) & (token_ids < vocabulary) & ~discarded[:, None]
            counts = valid.sum(dim=1, dtype=torch.int32)
            last = (counts - 1).clamp_min(0).long()
            newest = token_ids.gather(1, last[:, None])[:, 0]
        #: [B] int32: tokens a row got.
        self.counts = counts
        #: [B], the dtype of token_ids: 0 where a row got none.
        self.newest = torch.where(counts > 0, newest, 0)


def draft(
    proposer: KnapSpecProposer,
    scheduler_output: Any,
    sampled: Sampled,
    req_ids: list[str],
    # [B] int32: lengths that the step computed, its scheduled drafts included
    lengths: torch.Tensor,
    # [B, num_blocks] int32
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Drafts [B, num_speculative_tokens] int32 of the runner's rows, in its order.

    As wide as vLLM's own buffers, whatever is scheduled of it: a narrower copy to the host would
    not be contiguous there and waits for the device, and stale placeholders still find a token.
    """
    found: AsyncRound | None = getattr(scheduler_output, ROUND, None)
    decision = None if found is None else found.decides
    length = 0 if decision is None else decision.draft_length
    shape = len(req_ids), proposer.num_speculative_tokens
    drafts = torch.zeros(shape, dtype=torch.int32, device=lengths.device)
    if decision is None or not length:
        return drafts
    index = [i for i, req_id in enumerate(req_ids) if decision.limits.get(req_id)]
    if not index:
        return drafts
    scheduled = scheduler_output.scheduled_spec_decode_tokens
    verified = [len(scheduled.get(req_ids[i], ())) for i in index]
    where = ops.to_device(index, torch.int64, lengths.device)
    rejected = ops.to_device(verified, torch.int64, lengths.device) + 1
    rejected -= sampled.counts.index_select(0, where)
    # The newest token lies behind what was kept of the step.
    positions = lengths.index_select(0, where).long() - rejected
    limits = [decision.limits[req_ids[i]] for i in index]
    rows = DraftRows(
        index=index,
        req_ids=[req_ids[i] for i in index],
        tokens=sampled.newest.index_select(0, where).long(),
        positions=positions,
        host_positions=[decision.longest - length] * len(index),
        limits=limits,
        block_table=block_table.index_select(0, where),
    )
    assert decision.choice.plan is not None
    state = proposer.drafter.run(decision.choice.plan, length, rows)
    drafts[:, :length].index_copy_(0, where, state.drafts[: len(index), :length].clamp_min(0).int())
    decision.settled = proposer.drafter.settled
    proposer.stats.drafting_rounds += 1
    proposer.stats.draft_tokens += sum(limits)
    return drafts
