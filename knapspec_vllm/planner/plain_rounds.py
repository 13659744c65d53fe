# SPDX-License-Identifier: Apache-2.0
"""When a round that would draft shows instead what plain decoding takes.

A speedup is worth no more than what it is a multiple of, and while everything drafts nothing else
shows that.
"""

from __future__ import annotations

from collections import Counter

from knapspec_vllm.planner.corrections import Corrections, kind_of
from knapspec_vllm.planner.types import Batch

_FIRST, _MOST_TRIES = 4, 16
"""Plain rounds to measure before a kind of batch speculates, and how often to try: while requests
come and go no round can be measured."""
_COST, _LEAST_EVERY = 0.005, 8
"""Then so often that it costs this share of the time: every 33rd round at a speedup of 1.2, every
100th at 2. Measured every 256th, a plain step believed 15% too long kept a batch drafting at a
loss."""


class PlainRounds:
    """Counts the rounds that draft, and those it took from them."""

    def __init__(self, corrections: Corrections) -> None:
        self._corrections = corrections
        self._since = 0
        self._tries: Counter[tuple[int, int]] = Counter()

    def due(self, batch: Batch, speedup: float) -> bool:
        """Whether this round, which would draft at the predicted `speedup`, should not."""
        if not self._corrections.enabled:
            return False
        self._since += 1
        kind = kind_of(batch)
        unknown = self._corrections.count("plain", batch) < _FIRST
        every = max(_LEAST_EVERY, (1.0 - 1.0 / max(speedup, 1.0)) / _COST)
        if (unknown and self._tries[kind] < _MOST_TRIES) or self._since >= every:
            self._tries[kind] += 1
            self._since = 0
            return True
        return False
