# SPDX-License-Identifier: Apache-2.0
"""How much longer rounds really take than the cost curves say, learned from rounds.

The curves were measured before serving, component by component, at a few batch shapes. Rounds also
schedule, sample, keep books and run with caches that other work has used, and a shared machine
changes its pace within seconds: plain steps of one went from 23 to 40 ms and back, for hundreds of
rounds at a time. So the logarithm of measured over predicted time is taken to be a sum:

    plain step      pace + kind
    verify step     pace + kind + verify + verify of the kind
    draft forward   pace + kind + draft  + draft of the kind

pace: of the machine, moves quickly. kind: what sets a kind of batch apart. The rest is what sets
verify steps and drafts apart from plain steps, in general and for a kind; only that makes a
predicted speedup wrong, for a speedup is a quotient. All are states of a Kalman filter (local level
model; Durbin and Koopman, Time Series Analysis by State Space Methods, 2012, chapter 2), which
knows what an observation can tell: a run of verify steps that take longer says nothing about what
sets them apart, because the machine may be slow, and a plain step in its middle says much. Averages
of each part by itself believed plain steps at the pace of their time: on a machine that had become
faster since, drafting went on at 0.82x.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from knapspec_vllm.planner.types import Batch

Part = Literal["plain", "verify", "draft"]
Kind: TypeAlias = tuple[int, int]
_State: TypeAlias = "tuple[str, Kind | None]"

_NOISE = 0.1
"""Standard deviation of one round's time, as a share of it."""
_PACE, _PACE_STEP = 1.0, 0.04
"""Of the pace before anything is known, and of what a round changes it by: a third of what a target
step is off by counts for the next one."""
_MOST_STEPS = 64
"""Rounds, seen or not, after which the pace has become no more uncertain: it comes and goes."""
_PRIOR: dict[str, float] = {"kind": 0.15, "verify": 0.25, "draft": 0.25}
"""Of what the curves are off by; in general for verify steps and drafts, which is where caches and
bookkeeping show, and half of it for a kind of batch."""
_STEP = 0.003
"""Of what an observation changes these by: so much more may be learned next time."""
_REFUTED = 1.0
"""Of what was believed of a kind of batch, once it has turned out wrong."""
_FAR = 2.0
"""A round that is off by more than this factor (a compile, a pause) shows the less, the further."""
_SHORT = 3
"""So many rounds in a row that took less than 1/_FAR of what is believed: the belief is wrong, and
the longest of them takes its place. Disturbances only ever make a round longer. With curves that
were measured while other processes shared the cores speedups of 5 to 10 were predicted, and
drafting went on at 0.6x for hundreds of rounds."""
_VERSION_STEP = 0.005
"""A move of what sets a part apart by this much is worth choosing again."""
_CONTEXT_BUCKET = math.log(2.0)


@dataclass
class _Doubt:
    """Whether belief about a part of a kind of batch may be wrong."""

    short: int = 0
    """Rounds in a row that were shorter than belief allows."""
    longest: float = -math.inf
    """Of these, as a logarithm over what was believed."""
    elsewhere: bool = False
    """Another part of the same rounds has turned out wrong."""


class Corrections:
    """Measured over predicted time of each part of a round, for every kind of batch."""

    def __init__(self, enabled: bool = True) -> None:
        """enabled=False: learn nothing, every factor is 1."""
        self.enabled = enabled
        self._places: dict[_State, int] = {}
        self._mean = np.zeros(0)
        self._covariance = np.zeros((0, 0))
        self._add(("pace", None), 0.0, _PACE)
        for part in ("verify", "draft"):
            self._add((part, None), 0.0, _PRIOR[part])
        self._rounds = 0
        """Since the last observed step."""
        self._counts: Counter[tuple[Part, Kind]] = Counter()
        self._doubts: dict[tuple[Part, Kind], _Doubt] = {}
        self._published: dict[tuple[Part, Kind], float] = {}
        self.version = 0
        """Grows whenever what sets a part apart from plain steps has moved materially."""

    def note_round(self) -> None:
        """A round begins, whether or not it will be observed: the pace may change."""
        self._rounds += 1

    def observe(self, part: Part, batch: Batch, predicted_us: float, time_us: float) -> None:
        """One round's part. predicted_us: as the cost model prices it, uncorrected."""
        if not self.enabled or predicted_us <= 0 or time_us <= 0:
            return
        kind = kind_of(batch)
        states = self._states(part, kind)
        if part != "draft":  # a draft is of the same round as the step behind it
            self._covariance[0, 0] += min(max(1, self._rounds), _MOST_STEPS) * _PACE_STEP**2
            self._rounds = 0
        for state in states[1:]:
            self._covariance[state, state] += _STEP**2
        off = math.log(time_us / predicted_us) - float(self._mean[states].sum())
        if self._refuted(part, kind, off):
            for state in states[1:]:
                self._covariance[state, state] += _REFUTED**2
            off = self._doubts.pop((part, kind)).longest
            if part != "plain" and self._counts["plain", kind]:
                self._doubts.setdefault(("plain", kind), _Doubt()).elsewhere = True
            doubt = 1.0
        else:
            doubt = max(1.0, abs(off) / math.log(_FAR))
        column = self._covariance[:, states].sum(axis=1)
        gain = column / (column[states].sum() + (_NOISE * doubt) ** 2)
        self._mean += gain * off
        self._covariance -= np.outer(gain, column)
        self._counts[part, kind] += 1
        self._publish(batch, kind)

    def forget(self) -> None:
        """Believe half of what set drafting apart from plain steps, and learn anew: nothing of it
        has been seen for long. What all parts share stays, or a speedup would be wrong by it."""
        for (name, kind), place in self._places.items():
            if name in ("verify", "draft"):
                self._mean[place] *= 0.5
                self._covariance[place, place] += _deviation(name, kind) ** 2
        self.version += 1

    def pace(self, batch: Batch) -> float:
        """What plain steps of such a batch take now over what the curves say."""
        return math.exp(self._mean[0] + self._value("kind", kind_of(batch)))

    def relative(self, part: Part, batch: Batch) -> float:
        """How much more than the pace says a part is off; 1 for plain steps."""
        if part == "plain":
            return 1.0
        place = self._places[part, None]
        return math.exp(self._mean[place] + self._value(part, kind_of(batch)))

    def factor(self, part: Part, batch: Batch) -> float:
        """Measured over predicted time, as rounds are now."""
        return self.pace(batch) * self.relative(part, batch)

    def doubted(self, part: Part, batch: Batch) -> bool:
        """Whether belief about this kind of batch may be wrong: its last round was shorter than it
        allows, or another part of its rounds was."""
        doubt = self._doubts.get((part, kind_of(batch)))
        return doubt is not None and (doubt.short > 0 or doubt.elsewhere)

    def count(self, part: Part, batch: Batch) -> int:
        """Rounds of this kind of batch that were observed."""
        return self._counts[part, kind_of(batch)]

    def _states(self, part: Part, kind: Kind) -> list[int]:
        """Of which an observation is the sum; the part's own of this kind of batch is the last."""
        found: list[_State] = [("pace", None), ("kind", kind)]
        if part != "plain":
            found += [(part, None), (part, kind)]
        for name, where in found:
            if (name, where) not in self._places:
                self._add((name, where), self._value(name, kind), _deviation(name, where))
        return [self._places[state] for state in found]

    def _add(self, state: _State, mean: float, deviation: float) -> None:
        self._places[state] = len(self._mean)
        self._mean = np.append(self._mean, mean)
        self._covariance = np.pad(self._covariance, (0, 1))
        self._covariance[-1, -1] = deviation**2

    def _value(self, name: str, kind: Kind) -> float:
        """Of this kind of batch, else of the next shorter or longer one, whichever was seen more:
        requests of 2,000 tokens have 2,048 soon."""
        if (place := self._places.get((name, kind))) is not None:
            return float(self._mean[place])
        part: Part = "plain" if name == "kind" else name  # type: ignore[assignment]
        beside = [(kind[0], kind[1] + step) for step in (-1, 1)]
        known = [other for other in beside if (name, other) in self._places]
        if not known:
            return 0.0
        nearest = max(known, key=lambda other: self._counts[part, other])
        return float(self._mean[self._places[name, nearest]])

    def _refuted(self, part: Part, kind: Kind, off: float) -> bool:
        """Whether this round is the last of so many short ones that belief must be wrong."""
        if off >= -math.log(_FAR):
            self._doubts.pop((part, kind), None)
            return False
        doubt = self._doubts.setdefault((part, kind), _Doubt())
        doubt.short, doubt.longest = doubt.short + 1, max(doubt.longest, off)
        return doubt.short >= _SHORT

    def _publish(self, batch: Batch, kind: Kind) -> None:
        for part in ("verify", "draft"):
            now = math.log(self.relative(part, batch))
            if abs(now - self._published.get((part, kind), 0.0)) >= _VERSION_STEP:
                self._published[part, kind] = now
                self.version += 1


def _deviation(name: str, kind: Kind | None) -> float:
    prior = _PRIOR[name]
    return prior if kind is None or name == "kind" else 0.5 * prior


def kind_of(batch: Batch) -> Kind:
    """Batches of the same number of rows and context, each within a factor of 2.

    Up to a power of two, as a full server's batch is one, and while a request ends and the next
    begins a little less: at 15 rows nothing was learned, and it drafted there at a loss that it
    had long seen at 16.
    """
    context_bucket = int(math.log1p(batch.context_per_row) / _CONTEXT_BUCKET)
    return (batch.rows - 1).bit_length(), context_bucket
