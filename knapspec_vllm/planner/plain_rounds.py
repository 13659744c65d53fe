# SPDX-License-Identifier: Apache-2.0
"""When a round that would draft shows instead what plain decoding takes.

A speedup is worth no more than what it is a multiple of, and while everything drafts nothing else
shows that.
"""

from __future__ import annotations

from collections import Counter

from knapspec_vllm.planner.corrections import Corrections, kind_of
from knapspec_vllm.planner.types import Batch

_MOST_TRIES = 16
"""How often to try in a row for the first plain round of a kind of batch, before it speculates:
while requests come and go no round can be measured."""
_APART = 3
"""Rounds from the first to the second; from there on twice as many each time. Rounds in a row share
what else the machine does: four of them, measured once, were 10% off for a hundred rounds."""
_COST, _LEAST_EVERY = 0.005, 8
"""At last so often that it costs this share of the time: every 33rd round at a speedup of 1.2,
every 100th at 2. Measured every 256th, a plain step believed 15% too long kept a batch drafting at
a loss."""


class PlainRounds:
    """Counts, for each kind of batch, the rounds since a plain one was measured or tried."""

    def __init__(self, corrections: Corrections) -> None:
        self._corrections = corrections
        self._since: Counter[tuple[int, int]] = Counter()
        #: Tries in vain since the last plain round that could be measured.
        self._tries: Counter[tuple[int, int]] = Counter()
        self._measured: Counter[tuple[int, int]] = Counter()

    def due(self, batch: Batch, speedup: float) -> bool:
        """Whether this round, which would draft at the predicted `speedup`, should not."""
        if not self._corrections.enabled:
            return False
        kind, measured = kind_of(batch), self._corrections.count("plain", batch)
        if measured != self._measured[kind]:
            self._measured[kind] = measured
            self._since[kind] = self._tries[kind] = 0
        self._since[kind] += 1
        wait = self._wait(measured, self._tries[kind], speedup)
        if self._corrections.doubted("plain", batch) and not self._tries[kind]:
            wait = min(wait, _APART)
        if self._since[kind] < wait:
            return False
        self._tries[kind] += 1
        self._since[kind] = 0
        return True

    @staticmethod
    def _wait(measured: int, tries: int, speedup: float) -> float:
        """Rounds from the last plain one, or the last try, to the next."""
        most = max(_LEAST_EVERY, (1.0 - 1.0 / max(speedup, 1.0)) / _COST)
        if not measured:
            return 0.0 if tries < _MOST_TRIES else most
        if tries:
            return min(most, _LEAST_EVERY * 2.0 ** min(tries - 1, 16))
        return min(most, _APART * 2.0 ** min(measured - 1, 16))
