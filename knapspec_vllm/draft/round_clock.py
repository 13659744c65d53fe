# SPDX-License-Identifier: Apache-2.0
"""Measures what rounds really take, for the policy's overhead estimate."""

from __future__ import annotations

import time
from typing import Any

from knapspec_vllm.draft.planning import Planning
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.planner.types import Batch, Plan


class RoundClock:
    """Measures rounds: from the end of one proposal to the start of the next one.

    Only rounds of an unchanged set of rows without prefill count, so that neither waiting for
    requests nor prompt processing is mistaken for what a round costs.
    """

    def __init__(self) -> None:
        self._ended: float | None = None

    def stop(self) -> None:
        self._ended = None

    def ended(
        self,
        batch: Batch,
        rows: Candidates,
        plan: Plan | None,
        draft_lengths: list[int],
        drafting_us: float,
    ) -> None:
        """The proposal for `rows` is done; drafting took `drafting_us`."""
        self._batch, self._req_ids, self._plan = batch, list(rows.req_ids), plan
        self._forwards = max(draft_lengths)
        self._tokens = sum(draft_lengths) + len(draft_lengths)
        self._drafting_us = drafting_us
        self._ended = time.perf_counter()

    def started(self, planning: Planning, rows: Candidates, scheduler_output: Any) -> None:
        """The next proposal begins: the step between the two has been verified and sampled."""
        policy = planning.policy
        if self._ended is None or policy is None:
            return
        elapsed_us = (time.perf_counter() - self._ended) * 1e6 + self._drafting_us
        if rows.req_ids != self._req_ids or (
            scheduler_output.total_num_scheduled_tokens != self._tokens
        ):
            return
        priced_us = 0.0
        if self._plan is not None:
            priced_us = self._forwards * policy.costs.draft_us(self._plan, self._batch)
        tokens_per_row = max(1, round(self._tokens / self._batch.rows))
        policy.observe_round(self._batch, tokens_per_row, elapsed_us, priced_us)
