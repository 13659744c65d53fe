# SPDX-License-Identifier: Apache-2.0
"""How much longer rounds really take than the cost curves say, learned from rounds.

The curves were measured before serving, component by component, at a few batch shapes. Rounds also
schedule, sample, keep books and run with caches that other work has used. So the three parts of a
round are corrected by a factor each: plain steps, verify steps and draft forwards. Apart, because a
predicted speedup is a quotient of them: an error that all share cancels, one that they do not share
is the speedup's error. Per kind of batch, because a factor learned on large batches says little
about a small one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from knapspec_vllm.planner.types import Batch

Part = Literal["plain", "verify", "draft"]

_RATE = 1.0 / 32.0
"""Weight of the newest round in the moving average, once there are that many."""
_CLIP = 2.0
"""A round further off than this factor from what is known (a compile, a pause) counts as this. From
what is known, not from the prediction: curves may be off by more, and that has to be learned."""
_PRIOR: dict[Part, int] = {"plain": 1, "verify": 4, "draft": 4}
"""Rounds that what is believed without any counts as. One slow round must not end drafting, after
which nothing would show that it was an exception; plain rounds show it every time."""
_SHORT = 3
"""So many rounds in a row that took less than 1/_CLIP of what is believed: the belief is wrong, and
the longest of them takes its place. Disturbances only ever make a round longer. With curves that
were measured while other processes shared the cores speedups of 5 to 10 were predicted, and
drafting went on at 0.6x for hundreds of rounds."""
_VERSION_STEP = 0.005
"""A move of a factor by this much is worth choosing again."""
_CONTEXT_BUCKET = math.log(2.0)


@dataclass
class _Mean:
    log_factor: float = 0.0
    count: int = 0
    young: int = 0
    """Rounds since belief was replaced; all, if it never was."""
    published: float = math.inf
    short: int = 0
    """Rounds in a row that were shorter than belief allows."""
    longest: float = -math.inf
    """Of these."""
    doubted: bool = False
    """Another part of the same rounds has turned out wrong."""

    def refuted(self, log_factor: float) -> bool:
        """Whether this round is the last of so many short ones that belief must be wrong."""
        if log_factor >= self.log_factor - math.log(_CLIP):
            self.short, self.longest, self.doubted = 0, -math.inf, False
            return False
        self.short, self.longest = self.short + 1, max(self.longest, log_factor)
        return self.short >= _SHORT

    def replace(self, log_factor: float) -> None:
        """Believe this instead."""
        self.log_factor, self.young = log_factor, 1
        self.short, self.longest, self.doubted = 0, -math.inf, False

    def add(self, log_factor: float, prior: int) -> None:
        """One more round. prior: rounds that what was believed before any counts as."""
        clip = math.log(_CLIP)
        self.count, self.young = self.count + 1, self.young + 1
        step = min(max(log_factor - self.log_factor, -clip), clip)
        self.log_factor += max(_RATE, 1.0 / (self.young + prior)) * step


class Corrections:
    """Measured over predicted time of each part, as moving geometric means."""

    def __init__(self, enabled: bool = True) -> None:
        """enabled=False: learn nothing, every factor is 1."""
        self.enabled = enabled
        self._means: dict[tuple[Part, tuple[int, int] | None], _Mean] = {}
        self.version = 0
        """Grows whenever a factor has moved materially."""

    def observe(self, part: Part, batch: Batch, predicted_us: float, time_us: float) -> None:
        """One round's part. predicted_us: as the cost model prices it, uncorrected."""
        if not self.enabled or predicted_us <= 0 or time_us <= 0:
            return
        log_factor = math.log(time_us / predicted_us)
        believed, kind = math.log(self.factor(part, batch)), kind_of(batch)
        own = self._means.setdefault((part, kind), _Mean(believed))
        # Batches of all kinds take turns here, so that short rounds in a row mean nothing.
        overall = self._means.setdefault((part, None), _Mean(believed))
        if own.refuted(log_factor):
            truth = own.longest
            others = self._means.keys() - {(part, kind), (part, None)}
            # What a kind has only borrowed from the others may well be right for them.
            if own.count >= _SHORT or not any(other == part for other, _ in others):
                overall.replace(truth)
            own.replace(truth)
            plain = self._means.get(("plain", kind))
            if part != "plain" and plain is not None:
                plain.doubted = True
        for mean in (own, overall):
            mean.add(log_factor, _PRIOR[part])
            if abs(mean.log_factor - mean.published) >= _VERSION_STEP:
                mean.published = mean.log_factor
                self.version += 1

    def forget(self) -> None:
        """Believe half of what set drafting apart from plain steps, and learn anew: nothing of it
        has been seen for long. What all parts share stays, or a speedup would be wrong by it."""
        for (part, bucket), mean in self._means.items():
            if part != "plain":
                plain = self._means.get(("plain", bucket)) or self._means.get(("plain", None))
                shared = 0.0 if plain is None else plain.log_factor
                mean.log_factor = 0.5 * (mean.log_factor + shared)
                mean.count = mean.young = mean.short = 0
                mean.longest = -math.inf
        self.version += 1

    def factor(self, part: Part, batch: Batch) -> float:
        """For this kind of batch, else a neighbour in context, else over all batches; of others
        relative to plain steps, or a speedup would be off by what sets plain steps apart.
        Verify steps that nobody has seen are taken to be off as much as plain ones."""
        kind = kind_of(batch)
        if (mean := self._means.get((part, kind))) is not None:
            return math.exp(mean.log_factor)
        if (factor := self._of_neighbour(part, batch, kind)) is not None:
            return factor
        if (mean := self._means.get((part, None))) is not None:
            return math.exp(mean.log_factor + self._apart(part, kind, None))
        return self.factor("plain", batch) if part == "verify" else 1.0

    def _of_neighbour(self, part: Part, batch: Batch, kind: tuple[int, int]) -> float | None:
        """Of the next shorter or longer kind, whichever was seen more; relative to plain steps,
        where both kinds have shown them, because what all parts share belongs to its time."""
        beside = [(kind[0], kind[1] + step) for step in (-1, 1)]
        known = [other for other in beside if (part, other) in self._means]
        if not known:
            return None
        other = max(known, key=lambda which: self._means[part, which].count)
        return math.exp(self._means[part, other].log_factor + self._apart(part, kind, other))

    def _apart(self, part: Part, kind: tuple[int, int], other: tuple[int, int] | None) -> float:
        """How much longer plain steps of one kind are than another's, or all's, as a logarithm:
        verify steps and drafts have their part of it. 0 for plain steps, and while unknown."""
        here, there = (self._means.get(("plain", which)) for which in (kind, other))
        if part == "plain" or here is None or there is None:
            return 0.0
        return here.log_factor - there.log_factor

    def doubted(self, part: Part, batch: Batch) -> bool:
        """Whether belief about this kind of batch may be wrong: its last round was shorter than it
        allows, or another part of its rounds was."""
        mean = self._means.get((part, kind_of(batch)))
        return mean is not None and (mean.short > 0 or mean.doubted)

    def count(self, part: Part, batch: Batch) -> int:
        """Rounds of this kind of batch that were observed."""
        mean = self._means.get((part, kind_of(batch)))
        return 0 if mean is None else mean.count


def kind_of(batch: Batch) -> tuple[int, int]:
    """Batches of the same number of rows and context, each within a factor of 2.

    Up to a power of two, as a full server's batch is one, and while a request ends and the next
    begins a little less: at 15 rows nothing was learned, and it drafted there at a loss that it
    had long seen at 16.
    """
    context_bucket = int(math.log1p(batch.context_per_row) / _CONTEXT_BUCKET)
    return (batch.rows - 1).bit_length(), context_bucket
