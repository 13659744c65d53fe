# SPDX-License-Identifier: Apache-2.0
"""When a round drafts although that is predicted to lose, to learn whether it does.

Nothing is learned of drafting while declining. A plan that a few reference tokens made look worse
than it is would be declined for good: windows over 6,000 tokens were accepted at 0.99 where 16
reference tokens had promised 0.91, a speedup of 1.2 instead of 0.8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.corrections import kind_of
from knapspec_vllm.planner.speedups import SpeedupTable
from knapspec_vllm.planner.types import Batch, Choice, Plan

_FIRST, _FIRST_COST, _FIRST_EVERY = 4, 0.02, 16
"""Probes of a kind of batch that come soon, the share of the time that they may cost, and declined
rounds between them at least. Without a limit to their cost they were a reason why an engine that
came to decline was 8% behind in 128 of its first steps (SmolLM2, 4 x 200, 2-core CPU)."""
_COST, _LEAST_EVERY = 0.005, 32
"""The same of later ones."""
_HOPELESS = 64
"""Declined rounds until hope is looked for again where there is none."""
_Z = 1.64
"""A plan is worth a probe if its speedup may be enough with a probability of 5%."""


class Probes:
    """Counts declined rounds, and says when one of them may draft."""

    def __init__(self, min_speedup: float) -> None:
        self._min_speedup = min_speedup
        self._since = 0
        self._done: Counter[tuple[int, int]] = Counter()
        self._waits: dict[tuple[int, int], float] = {}
        """Until so many rounds since the last probe there is none for this kind of batch."""

    def note_round(self, declined: bool) -> None:
        self._since += declined

    def look_anew(self) -> None:
        """Other plans, or other beliefs: what was hopeless may be no longer."""
        self._waits.clear()

    def may_be_due(self, batch: Batch) -> bool:
        """Whether it is worth looking for one, which takes a millisecond on a slow core."""
        return self._since >= self._waits.get(kind_of(batch), _FIRST_EVERY)

    def choose(
        self,
        batch: Batch,
        table: SpeedupTable,
        plans: Sequence[Plan],
        acceptance: AcceptanceModel,
        pace: float = 1.0,
    ) -> Choice | None:
        """The draft that may gain most, if it may gain enough and a probe is due.

        table: of `plans`, which lose; its times are to be multiplied by `pace`.
        """
        rates, found = table.rates, []
        # What verification kept of the promised so far, it kept of the same few drafts.
        hopeful = replace(rates, kept=1.0)
        for index, plan in enumerate(plans):
            hope = acceptance.upper(plan, batch.context_per_row, z=_Z)
            row = hopeful.row(hope, table.draft_us[index])
            column = max(range(len(row)), key=row.__getitem__)
            found.append((row[column], index, column))
        hope, index, column = max(found)
        length, speedup = rates.lengths[column], table.speedups[index][column]
        round_us = length * table.draft_us[index] + rates.verify_us[column]
        lost_rounds = max(0.0, 1.0 - speedup) * round_us / max(rates.plain_us, 1e-9)
        if hope < self._min_speedup:
            self._waits[kind_of(batch)] = self._since + _HOPELESS
            return None
        if not self._due(kind_of(batch), lost_rounds):
            return None
        reason = f"a round to see: predicted speedup {speedup:.2f}, may be {hope:.2f}"
        return Choice(plans[index], length, speedup, reason, "probing", pace * round_us)

    def _due(self, kind: tuple[int, int], lost_rounds: float) -> bool:
        """lost_rounds: what the probe is expected to lose, in plain rounds."""
        if self._done[kind] < _FIRST:
            every = max(_FIRST_EVERY, lost_rounds / _FIRST_COST)
        else:
            every = max(_LEAST_EVERY, lost_rounds / _COST)
        if self._since < every:
            self._waits[kind] = every
            return False
        self._since = 0
        self._waits.clear()
        self._done[kind] += 1
        return True
