# SPDX-License-Identifier: Apache-2.0
"""Acceptance: how likely a drafted token of a plan is accepted, given those before it were.

A plan starts from how far its states end from the target's (`slope`), and from the solver's top-1
agreement, a few dozen trials of which the planner picks the luckiest (a Beta prior). Verification
then tells the truth, round by round, with exponential forgetting.

What verification says of the plans that draft also says something of the others: text may be
harder than the reference tokens were, or the context longer. So it changes the slope that all
share. Without it every plan that has not drafted yet looks better than those that have, and is
tried in its turn: predictions were 10% too high at 5,000 tokens of context (block-expanded
SmolLM2). As much for plans near the target as for those far from it would be wrong too: a plan of
0.94 that skipped more than it should kept drafting where lighter ones had 0.98 (the same model).

Drafts of a plan are not accepted alike at every length of context: windows see a smaller part of a
longer one. So what verification says is kept by context length, and of the other lengths counts no
more than a few dozen tokens: 0.94 was believed at 5,000 tokens where drafts had 0.89, because the
same plan had long done well at 2,000 (the same model; 13% too many tokens promised).

One acceptance for all rows and positions promises too much where rows differ: those whose drafts
are long accepted show most of it. Of 16 clients at temperatures 0 and 0.8 the first, second and
third token were accepted at 0.82, 0.71 and 0.65 where 0.89, 0.80 and 0.71 were believed. So what is
really kept of what was promised is a factor of its own.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from knapspec_vllm.metrics.stats import CONTEXT_BOUNDS
from knapspec_vllm.planner.objective import expected_tokens
from knapspec_vllm.planner.selection import smoothed_hits
from knapspec_vllm.planner.slope import Slope, distance_of
from knapspec_vllm.planner.types import Plan, PlanEstimate

NEUTRAL_ALPHA = 0.7
"""Of a plan of which nothing is known."""
HITS_COUNT = 0.5
"""What an agreeing reference token counts: 16 of them say less than the distance does."""
_LEARN_EVERY = 16.0
"""Verified tokens from one look at the slope to the next: a look takes 0.1 ms."""
DRIFT_MIN_TRIALS = 32.0
"""Below this many remembered verified tokens a plan's drift is not reported."""
VERSION_STEP = 0.005
"""A change of some alpha by this much is worth choosing again."""
BORROWED_TRIALS = 64.0
"""Verified tokens, at most, that other lengths of context count as together."""
KEPT_PRIOR = 32.0
"""Accepted tokens, as promised, that no difference between the two counts as. About 250 promised
tokens are remembered at the default half-life: of 64 a fifth of a shortfall was never believed."""
_LEAST_KEPT = 0.5
_LEAST_WEIGHT = 1e-9
_SLOPE_STEP = 0.05
"""The same for the logarithm of the slope: it moves an alpha by 0.018 at most."""


@dataclass
class _Seen:
    """Verified tokens at one length of context, decayed with time."""

    accepted: float = 0.0
    rejected: float = 0.0
    published: float = -1.0
    """alpha when the version last changed."""


@dataclass
class _Evidence:
    hits: float = 0.0
    """Solver's agreeing reference tokens, of `trials`."""
    trials: float = 0.0
    distance: float | None = None
    """Of its last states to the target's; None: not known."""
    recent: tuple[float, float] = (0.0, 0.0)
    """Verified (accepted, rejected), decayed by all that was drafted since, with whatever plan."""
    seen: dict[int, _Seen] = field(default_factory=dict)
    """By bucket of the context's length."""

    def keep(self, share: float) -> None:
        """What is left of all that was seen."""
        for seen in self.seen.values():
            seen.accepted *= share
            seen.rejected *= share
        self.age(share)

    def age(self, share: float) -> None:
        """What of it is recent."""
        self.recent = share * self.recent[0], share * self.recent[1]

    def verified(self, bucket: int | None = None) -> tuple[float, float]:
        """(accepted, rejected): all of them, or what they say of one bucket."""
        everything = list(self.seen.values())  # at once: metrics ask from another thread
        accepted = sum(seen.accepted for seen in everything)
        rejected = sum(seen.rejected for seen in everything)
        if bucket is None:
            return accepted, rejected
        own = self.seen.get(bucket) or _Seen()
        accepted, rejected = accepted - own.accepted, rejected - own.rejected
        borrowed = accepted + rejected
        share = BORROWED_TRIALS / borrowed if borrowed > BORROWED_TRIALS else 1.0
        return own.accepted + share * accepted, own.rejected + share * rejected


@dataclass
class _Promise:
    """Of all plans at one length of context, decayed with time: tokens that were accepted, and
    those that acceptance promised of drafts of these lengths."""

    accepted: float = 0.0
    promised: float = 0.0
    published: float = 1.0


class AcceptanceModel:
    """Beta estimates per plan. Deterministic: equal inputs give equal numbers on every rank."""

    def __init__(self, prior_weight: float = 16.0, feedback_half_life: float = 256.0) -> None:
        """prior_weight: of what the distance says, in tokens. half life: in drafted tokens."""
        if prior_weight < 0 or feedback_half_life <= 0:
            raise ValueError("prior_weight must be >= 0 and feedback_half_life > 0")
        self._prior_weight = prior_weight
        self._decay_log = math.log(0.5) / feedback_half_life
        self._plans: dict[Plan, _Evidence] = {}
        self._slope = Slope()
        self._published_slope = self._slope.value
        self._unlearned = 0.0
        """Tokens verified since the slope was looked at."""
        self._promises: dict[int, _Promise] = {}
        self.version = 0
        """Grows whenever some alpha has moved by VERSION_STEP or more."""

    def priors(self, estimates: Sequence[PlanEstimate]) -> None:
        """What the solver says of a frontier's plans, in its order; what verification taught of
        them keeps counting half."""
        for estimate, hits in zip(estimates, smoothed_hits(estimates), strict=True):
            evidence = self._plans.setdefault(estimate.plan, _Evidence())
            evidence.hits, evidence.trials = hits, float(estimate.trials)
            evidence.distance = distance_of(estimate.cosine) if estimate.trials else None
            evidence.keep(0.5)
        self._relearn()

    def observe(self, plan: Plan, rows: Sequence[tuple[int, int]], context: float = 0) -> None:
        """One verified round of a plan. rows: (accepted, drafted) tokens of each: `accepted`
        successes, and one failure if accepted < drafted.

        Tokens after the first rejection say nothing about acceptance and are not counted. The rows
        of a round count alike however many they are: what was known is forgotten once, by all they
        drafted. Forgotten row by row, the last 90 of 256 rows would have been all that counts.
        context: tokens a row of the batch that drafted, in the mean; what alpha is asked for.
        """
        for accepted, drafted in rows:
            if not 0 <= accepted <= drafted:
                raise ValueError(f"accepted must lie in 0..drafted, got {accepted} of {drafted}")
        rows = [row for row in rows if row[1]]
        if not rows:
            return
        evidence = self._plans.setdefault(plan, _Evidence())
        keep = math.exp(self._decay_log * sum(drafted for _, drafted in rows))
        self._note_promise(plan, evidence, rows, context, keep)
        accepted = sum(accepted for accepted, _ in rows)
        rejected = sum(accepted < drafted for accepted, drafted in rows)
        own = evidence.seen.setdefault(_bucket(context), _Seen())
        own.accepted = own.accepted * keep + accepted
        own.rejected = own.rejected * keep + rejected
        for known in self._plans.values():
            known.age(keep)
        evidence.recent = evidence.recent[0] + accepted, evidence.recent[1] + rejected
        self._unlearned += accepted + rejected
        if self._unlearned >= _LEARN_EVERY:
            self._learn_slope()
        alpha = self.alpha(plan, context)
        if abs(alpha - own.published) >= VERSION_STEP:
            own.published = alpha
            self.version += 1

    def _note_promise(
        self,
        plan: Plan,
        evidence: _Evidence,
        rows: Sequence[tuple[int, int]],
        context: float,
        keep: float,
    ) -> None:
        """Of plans that verification knows: what is wrong with a new one, its alpha will say."""
        if sum(evidence.verified(_bucket(context))) < DRIFT_MIN_TRIALS:
            return
        promise = self._promises.setdefault(_bucket(context), _Promise())
        alpha = self.alpha(plan, context)
        promised = sum(expected_tokens(alpha, drafted) - 1.0 for _, drafted in rows)
        promise.accepted = promise.accepted * keep + sum(accepted for accepted, _ in rows)
        promise.promised = promise.promised * keep + promised
        kept = self.kept(context)
        if abs(kept - promise.published) >= VERSION_STEP:
            promise.published = kept
            self.version += 1

    def forget(self, share: float = 0.5) -> None:
        """Drops a share of what verification taught, so that a declined plan gets another try."""
        for evidence in self._plans.values():
            evidence.keep(1.0 - share)
        for promise in self._promises.values():
            promise.accepted *= 1.0 - share
            promise.promised *= 1.0 - share
        self._learn_slope()
        self.version += 1

    def retain(self, plans: set[Plan]) -> None:
        """Forgets every plan not in `plans`; a long-lived server meets many frontiers. So is what
        the others have shown of all plans: the solver that found these has seen the text that
        showed it. It has not seen how rows differ, so what is kept of promises stays."""
        for plan in [plan for plan in self._plans if plan not in plans]:
            del self._plans[plan]
        self._relearn()

    def _relearn(self) -> None:
        """Everything about the slope, of the plans that are known."""
        self._slope.learn_references((d, e.hits, e.trials) for d, e in self._placed())
        self._learn_slope()
        self.version += 1

    def _learn_slope(self) -> None:
        self._unlearned = 0.0
        self._slope.learn_verified((d, *e.recent) for d, e in self._placed())
        if abs(math.log(self._slope.value / self._published_slope)) >= _SLOPE_STEP:
            self._published_slope = self._slope.value
            self.version += 1

    def _placed(self) -> list[tuple[float, _Evidence]]:
        """The plans whose distance the solver has measured, with it."""
        return [(e.distance, e) for e in self._plans.values() if e.distance is not None]

    def alpha(self, plan: Plan, context: float | None = None) -> float:
        """Mean of the plan's posterior, 0..1. context: a row's tokens; None: over all lengths."""
        hits, trials = self._posterior(plan, context)
        return hits / trials

    def lower(self, plan: Plan, context: float | None = None, *, z: float = 1.0) -> float:
        """alpha less z posterior standard deviations, at least 0."""
        return max(0.0, self._bound(plan, context, -z))

    def upper(self, plan: Plan, context: float | None = None, *, z: float = 1.0) -> float:
        """alpha and z posterior standard deviations, at most 1."""
        return min(1.0, self._bound(plan, context, z))

    def kept(self, context: float) -> float:
        """Accepted tokens over those promised, at this length of context; at most 1, because luck
        with a few drafts must not promise more than one acceptance can."""
        promise = self._promises.get(_bucket(context)) or _Promise()
        kept = (promise.accepted + KEPT_PRIOR) / (promise.promised + KEPT_PRIOR)
        return min(max(kept, _LEAST_KEPT), 1.0)

    def _bound(self, plan: Plan, context: float | None, z: float) -> float:
        hits, trials = self._posterior(plan, context)
        mean = hits / trials
        return mean + z * math.sqrt(mean * (1.0 - mean) / (trials + 1.0))

    def drift(self, plan: Plan, context: float | None = None) -> float:
        """Observed acceptance minus the solver's estimate; 0 while either has little data.
        context: as in alpha; what an hour ago was seen at another length must not hide it."""
        evidence = self._plans.get(plan)
        if evidence is None or not evidence.trials:
            return 0.0
        accepted, rejected = evidence.verified(None if context is None else _bucket(context))
        if accepted + rejected < DRIFT_MIN_TRIALS:
            return 0.0
        return accepted / (accepted + rejected) - self._solver_mean(evidence)

    def _solver_mean(self, evidence: _Evidence) -> float:
        """As the reference tokens alone have it."""
        trials = HITS_COUNT * evidence.trials + self._prior_weight
        expected = NEUTRAL_ALPHA
        if evidence.distance is not None:
            expected = math.exp(-self._slope.solver * evidence.distance)
        hits = HITS_COUNT * evidence.hits + self._prior_weight * expected
        return hits / trials if trials else expected

    def _posterior(self, plan: Plan, context: float | None) -> tuple[float, float]:
        """(successes, trials) of prior, solver and verification together; trials > 0."""
        evidence = self._plans.get(plan) or _Evidence()
        # exp(-slope * distance) at the slope that verification says.
        mean = self._solver_mean(evidence) ** (self._slope.value / self._slope.solver)
        weight = max(HITS_COUNT * evidence.trials + self._prior_weight, _LEAST_WEIGHT)
        bucket = None if context is None else _bucket(context)
        accepted, rejected = evidence.verified(bucket)
        return mean * weight + accepted, weight + accepted + rejected


def _bucket(context: float) -> int:
    """Those of `knapspec:accepted_tokens_total{context}`."""
    return bisect_right(CONTEXT_BOUNDS, context)
