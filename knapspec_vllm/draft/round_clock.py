# SPDX-License-Identifier: Apache-2.0
"""Measures what rounds really take, and holds it against what was predicted of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from knapspec_vllm.draft.planning import Planning
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner.types import Batch, Choice

_PAUSED = 20.0
"""A round that takes so many times what it should was interrupted: a paused engine, a debugger."""
_DOUBTS = 3
"""So many of them in a row: then it is the prediction that is wrong, and has to be learned."""


@dataclass(frozen=True)
class _Round:
    """A round from the choice on; its verify step is still to come."""

    batch: Batch
    req_ids: list[str]
    choice: Choice
    forwards: int
    scheduled_tokens: int
    """If every draft is scheduled and nothing else is."""
    draft_us: float
    solve_us: float
    unusual: bool
    """Teaches nothing: kernels wait for a solve's, and what follows one finds its caches cold."""
    own_us: float
    """Spent in the proposal on anything but drafting and solving."""
    ended: float


class RoundClock:
    """A round is a proposal and the engine's step after it, up to the next proposal.

    Only rounds of an unchanged set of rows without prefill count, so that neither waiting for
    requests nor prompt processing is mistaken for what a round costs.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._round: _Round | None = None
        self._entered = 0.0
        self._doubted = 0
        """Rounds in a row that were taken to be interrupted."""

    @property
    def running(self) -> bool:
        """Whether there is a round that the next proposal will have measured."""
        return self._round is not None

    def stop(self) -> None:
        self._round = None

    def entered(self) -> None:
        """The engine has called for a proposal."""
        self._entered = time.perf_counter()

    def rested(self) -> None:
        """A round that declined as the one before it, of the same rows, and was not looked at. That
        one counts, or rounds that draft would be most of what is measured, and teaches nothing."""
        last = self._round
        if last is None:
            return
        engine_us = (self._entered - last.ended) * 1e6
        round_us = engine_us + last.own_us
        self._doubted, stop = interrupted(last.choice.round_us, round_us, self._doubted)
        if not stop:
            self._stats.add_round(engine_us, last.own_us, 0.0, 0.0)
        if not (stop or last.unusual):
            self._stats.add_prediction(1.0, last.choice.round_us, round_us, round_us)
        now = time.perf_counter()
        self._round = replace(last, own_us=(now - self._entered) * 1e6, solve_us=0.0, ended=now)

    def verified(
        self,
        planning: Planning,
        rows: Candidates,
        scheduled_tokens: int,
        sampled_token_ids: Sequence[Sequence[int]],
    ) -> None:
        """The step before this proposal is over: it has verified the last round's drafts."""
        last, policy, stats = self._round, planning.policy, self._stats
        if last is None:
            return
        if rows.req_ids != last.req_ids or scheduled_tokens != last.scheduled_tokens:
            return
        engine_us = (self._entered - last.ended) * 1e6
        step_us = engine_us + last.own_us
        round_us = step_us + last.draft_us
        self._doubted, stop = interrupted(last.choice.round_us, round_us, self._doubted)
        if stop:
            return
        stats.add_round(engine_us, last.own_us, last.draft_us, last.solve_us)
        if policy is None or last.unusual:
            return
        policy.observe_step(last.batch, last.scheduled_tokens / last.batch.rows, step_us)
        if last.forwards and last.choice.plan is not None:
            policy.observe_draft(last.batch, last.choice.plan, last.forwards, last.draft_us)
        plain_us = round_us  # of a round that declined, which is what plain steps are learned from
        if last.choice.plan is not None:
            gained = sum(len(sampled_token_ids[i]) for i in rows.index) / len(rows)
            plain_us = gained * policy.plain_us(last.batch)
        choice = last.choice
        stats.add_prediction(choice.predicted_speedup, choice.round_us, plain_us, round_us)

    def ended(
        self,
        batch: Batch,
        rows: Candidates,
        choice: Choice,
        draft_lengths: list[int],
        forwards: int,
        draft_us: float,
        solve_us: float,
        unusual: bool,
    ) -> None:
        """The proposal for `rows` is done, after draft_us of drafting and solve_us of solving.

        forwards: draft steps that ran, more than the longest draft where a GPU does not look
        whether all rows have stopped.
        unusual: a solve ran in it, or the device is still busy with one, or a draft step was run
        for the first time. Nothing is learned from such a round.
        """
        now = time.perf_counter()
        self._round = _Round(
            batch=batch,
            req_ids=list(rows.req_ids),
            choice=choice,
            forwards=forwards,
            scheduled_tokens=sum(draft_lengths) + len(draft_lengths),
            draft_us=draft_us,
            solve_us=solve_us,
            unusual=unusual,
            own_us=max(0.0, (now - self._entered) * 1e6 - draft_us - solve_us),
            ended=now,
        )


def interrupted(predicted_us: float, time_us: float, doubted: int) -> tuple[int, bool]:
    """(Rounds in a row that were taken to be interrupted, whether this one is); doubted: before."""
    if not 0 < _PAUSED * predicted_us < time_us or doubted >= _DOUBTS:
        return 0, False
    return doubted + 1, True
