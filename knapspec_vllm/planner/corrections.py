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
faster since, drafting went on at 0.86x.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from knapspec_vllm.planner.types import Batch

Part = Literal["plain", "verify", "draft"]
Kind: TypeAlias = tuple[int, int]
_State: TypeAlias = "tuple[str, Kind | None]"

_NOISE = 0.1
"""Standard deviation of one round's time, as a share of it."""
_PACE_STEP = 0.04
"""Of what a round changes the pace by: a third of what a target step is off by counts for the next
one."""
_MOST_ROUNDS = 64
"""Rounds, seen or not, after which the pace has become no more uncertain: it comes and goes."""
_PRIOR: dict[str, float] = {"pace": 0.3, "kind": 0.15, "verify": 0.25, "draft": 0.25}
"""Of what the curves are off by, before anything is known; for verify steps and drafts, where
caches and bookkeeping show, in general, and _OF_KIND of it for a kind of batch."""
_OF_KIND = 0.5
_STEP = 0.003
"""Of what an observation changes these by: so much more may be learned next time."""
_MOST_STEP = 0.2
"""A round that is off by more counts in full for the pace, but no more than this for these, if they
are known better: two deviations of a round."""
_REFUTED = 1.0
"""Of what was believed of a part of a kind of batch, once it has turned out wrong."""
_FAR = 2.0
"""A round that is off by more than this factor (a compile, a pause) shows less of the pace."""
_SHORT = 3
"""So many rounds in a row that took less than 1/_FAR of what is believed: the belief is wrong, and
the longest of them takes its place. Disturbances only ever make a round longer. With curves that
were measured while other processes shared the cores speedups of 5 to 10 were predicted, and
drafting went on at 0.6x for hundreds of rounds."""
_VERSION_STEP = 0.005
"""A move of what sets a part apart by this much is worth choosing again."""
_CONTEXT_BUCKET = math.log(2.0)
_MOST_KINDS = 32
"""Of batches; the one not seen for longest makes room: of 99 states a correction takes 50 us."""


@dataclass
class _Doubt:
    """Whether belief about a part of a kind of batch may be wrong."""

    short: int = 0
    """Rounds in a row that were shorter than belief allows."""
    longest: float = -math.inf
    """Of these, the logarithm of measured over predicted time."""
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
        self._kinds: OrderedDict[Kind, None] = OrderedDict()
        """The one seen last at the end."""
        for name in ("pace", "verify", "draft"):
            self._add((name, None), _prior(name, None))
        self._rounds = 0
        """Since the last observed step."""
        self._counts: Counter[tuple[Part, Kind]] = Counter()
        self._doubts: dict[tuple[Part, Kind], _Doubt] = {}
        self._published: dict[tuple[str, Kind | None], float] = {}
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
        self._let_time_pass(part, kind, states)
        seen = math.log(time_us / predicted_us)
        off = seen - float(self._mean[states].sum())
        if self._refuted(part, kind, off, seen):
            off = self._doubts.pop((part, kind)).longest - float(self._mean[states].sum())
            self._doubt_all(part, kind)
            self._correct(states, off, _NOISE, math.inf)
        else:
            noise = _NOISE * max(1.0, abs(off) / math.log(_FAR))
            self._correct(states, off, noise, _MOST_STEP)
        self._counts[part, kind] += 1
        self._publish(batch, kind)

    def _let_time_pass(self, part: Part, kind: Kind, states: list[int]) -> None:
        """What may have changed since it was last seen has become uncertain."""
        if part != "draft" or self._rounds:  # drafts are mostly of the round of the step behind
            rounds = min(max(1, self._rounds), _MOST_ROUNDS)
            self._covariance[0, 0] += rounds * _PACE_STEP**2
            self._rounds = 0
        # Towards the prior: for hours only sums are seen, and their parts must not drift apart.
        priors = np.array([_prior(*state) for state in _summands(part, kind)[1:]])
        self._fade(states[1:], np.sqrt(1.0 - (_STEP / priors) ** 2), priors)

    def _fade(self, states: list[int], kept: np.ndarray, priors: np.ndarray) -> None:
        """Believe `kept` of these, and doubt them as much more; all of it would be as at first."""
        self._mean[states] *= kept
        self._covariance[states, :] *= kept[:, None]
        self._covariance[:, states] *= kept
        self._covariance[states, states] += (1.0 - kept**2) * priors**2

    def _doubt_all(self, part: Part, kind: Kind) -> None:
        """A part of this kind of batch is not what it was believed to be. Other kinds may well be,
        but where a part was seen in no other there is nothing to say what is the kind's doing."""
        wrong: list[_State] = [(part if part != "plain" else "kind", kind)]
        if part == "plain":  # the others were held against it
            wrong += [("verify", kind), ("draft", kind)]
        elif not any(name == part and other not in (None, kind) for name, other in self._places):
            wrong.append((part, None))
        for state in wrong:
            if (place := self._places.get(state)) is not None:
                self._covariance[place, place] += _REFUTED**2
        if part != "plain" and self._counts["plain", kind]:
            self._doubts.setdefault(("plain", kind), _Doubt()).elsewhere = True

    def _correct(self, states: list[int], off: float, noise: float, most: float) -> None:
        """Kalman's correction of a sum of states that is `off`. All but the pace take no more of it
        than `most`, or what may well be wrong with them: one slow round must not end drafting."""
        column = self._covariance[:, states].sum(axis=1)
        variance = float(column[states].sum()) + noise**2
        gain = column / variance
        slow = states[1:]
        doubt = math.sqrt(max(0.0, float(self._covariance[np.ix_(slow, slow)].sum())))
        gain[1:] *= min(1.0, max(most, doubt) / max(abs(off), 1e-9))
        self._mean += gain * off
        # Joseph's form, which holds for any gain.
        change = np.outer(gain, 0.5 * variance * gain - column)
        self._covariance += change
        self._covariance += change.T

    def forget(self) -> None:
        """Believe half of what set drafting apart from plain steps, and learn anew: nothing of it
        has been seen for long. What all parts share stays, or a speedup would be wrong by it."""
        for (name, kind), place in self._places.items():
            if name in ("verify", "draft"):
                self._fade([place], np.array([0.5]), np.array([_prior(name, kind)]))
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
        if kind in self._kinds:
            self._kinds.move_to_end(kind)
        else:
            if len(self._kinds) >= _MOST_KINDS:
                self._drop(next(iter(self._kinds)))
            self._kinds[kind] = None
        found = _summands(part, kind)
        for state in found:
            if state not in self._places:
                self._add(state, _prior(*state), self._neighbour(state[0], kind))
        return [self._places[state] for state in found]

    def _add(self, state: _State, deviation: float, like: int | None = None) -> None:
        """Another state, as far as is known like that one."""
        place = self._places[state] = len(self._mean)
        self._mean = np.append(self._mean, 0.0 if like is None else self._mean[like])
        self._covariance = np.pad(self._covariance, (0, 1))
        if like is not None:
            self._covariance[place, :] = self._covariance[like, :]
            self._covariance[:, place] = self._covariance[:, like]
        self._covariance[place, place] += deviation**2

    def _drop(self, kind: Kind) -> None:
        del self._kinds[kind]
        for part in get_args(Part):  # when it comes back, it is measured as a new one
            self._counts.pop((part, kind), None)
            self._doubts.pop((part, kind), None)
        gone = [place for (_, other), place in self._places.items() if other == kind]
        kept = [state for state, place in self._places.items() if place not in gone]
        self._mean = np.delete(self._mean, gone)
        self._covariance = np.delete(np.delete(self._covariance, gone, axis=0), gone, axis=1)
        self._places = {state: place for place, state in enumerate(kept)}

    def _value(self, name: str, kind: Kind) -> float:
        """Of this kind of batch, else of its neighbour, else 0."""
        place = self._places.get((name, kind), self._neighbour(name, kind))
        return 0.0 if place is None else float(self._mean[place])

    def _neighbour(self, name: str, kind: Kind) -> int | None:
        """The state of the next shorter or longer kind, whichever was seen more: requests of 2,000
        tokens have 2,048 soon."""
        part: Part = "plain" if name == "kind" else name  # type: ignore[assignment]
        beside = [(kind[0], kind[1] + step) for step in (-1, 1)]
        known = [other for other in beside if (name, other) in self._places]
        if not known:
            return None
        return self._places[name, max(known, key=lambda other: self._counts[part, other])]

    def _refuted(self, part: Part, kind: Kind, off: float, seen: float) -> bool:
        """Whether this round is the last of so many short ones that belief must be wrong."""
        if off >= -math.log(_FAR):
            self._doubts.pop((part, kind), None)
            return False
        doubt = self._doubts.setdefault((part, kind), _Doubt())
        doubt.short, doubt.longest = doubt.short + 1, max(doubt.longest, seen)
        return doubt.short >= _SHORT

    def _publish(self, batch: Batch, kind: Kind) -> None:
        for part in ("verify", "draft"):
            general = float(self._mean[self._places[part, None]])
            for where, now in ((None, general), (kind, math.log(self.relative(part, batch)))):
                if abs(now - self._published.get((part, where), 0.0)) >= _VERSION_STEP:
                    self._published[part, where] = now
                    self.version += 1


def _summands(part: Part, kind: Kind) -> list[_State]:
    """The states whose sum an observation is, the pace first."""
    of_part: list[_State] = [] if part == "plain" else [(part, None), (part, kind)]
    return [("pace", None), ("kind", kind), *of_part]


def _prior(name: str, kind: Kind | None) -> float:
    """Deviation of a state before anything is known."""
    return _PRIOR[name] if kind is None or name == "kind" else _OF_KIND * _PRIOR[name]


def kind_of(batch: Batch) -> Kind:
    """Batches of the same number of rows and context, each within a factor of 2.

    Up to a power of two, as a full server's batch is one, and while a request ends and the next
    begins a little less: at 15 rows nothing was learned, and it drafted there at a loss that it
    had long seen at 16.
    """
    context_bucket = int(math.log1p(batch.context_per_row) / _CONTEXT_BUCKET)
    return (batch.rows - 1).bit_length(), context_bucket
