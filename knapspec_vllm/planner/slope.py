# SPDX-License-Identifier: Apache-2.0
"""How acceptance falls with the distance of a draft's last states from the target's.

A small difference of the states flips the most likely token where two logits are near a tie, and
of those there are the more the larger it is. So, with x and t the draft's and the target's states
after the last item, of length 1:

    acceptance = exp(-slope * distance)        distance = |x - t| = sqrt(2 - 2 * cosine)

One number of a model and its text, for all plans of a frontier: each plan's reference tokens tell
of it, and what verification says of one plan says so much of the others as their distances allow.
In 30 windows (18 of SmolLM2 at 400 tokens, 6 at 2,000, 6 of its block expansion at 2,000; 16
reference tokens, plans judged on the next 96) slopes lay between 0.7 and 2.7. Believed this way
acceptance was off by 0.12, 0.11 and 0.04 (root mean square over plans), by 0.15, 0.14 and 0.05
where plans were shrunk toward one mean; the speedup of the plan that looked best was promised 0, 5
and 2% too high, and 10, 11 and 12%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

SLOPE = 2.0
"""Where nothing is known."""
_SPREAD = 1.0
"""Standard deviation of its logarithm. Models whose states all point the same way (activations of a
few huge dimensions) have slopes many times as steep; 16 reference tokens have to be able to say
so."""
_MOST_VERIFIED = 64.0
"""Verified tokens that count, at most, as `BORROWED_TRIALS` of acceptance."""
_LEAST_RATIO, _MOST_RATIO = 0.5, 4.0
"""A plan that is worse or better than its distance, for reasons of its own, changes the slope by no
more than this."""
_LOGS = [0.1 * step for step in range(-50, 51)]
_SLOPES = [SLOPE * math.exp(log) for log in _LOGS]
_PRIOR = [-0.5 * (log / _SPREAD) ** 2 for log in _LOGS]
_LEAST_REJECTED = 1e-4


def distance_of(cosine: float) -> float:
    """Between states of length 1."""
    return math.sqrt(max(0.0, 2.0 - 2.0 * cosine))


class Slope:
    """The most likely slope, of the solver's reference tokens alone and with what was verified."""

    def __init__(self) -> None:
        self._likelihood = _PRIOR
        self.solver = SLOPE
        """By the solver's reference tokens."""
        self.value = SLOPE

    def learn_references(self, plans: Iterable[tuple[float, float, float]]) -> None:
        """plans: (distance, hits, trials) of each; their reference tokens are the same, so all
        plans together count as often as one has trials."""
        plans = list(plans)
        self._likelihood = _PRIOR
        share = 1.0 / max(1, len(plans))
        for distance, hits, trials in plans:
            self._likelihood = _with(
                self._likelihood, distance, share * hits, share * (trials - hits)
            )
        self.solver = self.value = _best(self._likelihood)

    def learn_verified(self, plans: Iterable[tuple[float, float, float]]) -> None:
        """plans: (distance, accepted, rejected) tokens; replaces what was verified before."""
        plans = list(plans)
        total = sum(accepted + rejected for _, accepted, rejected in plans)
        share = min(1.0, _MOST_VERIFIED / total) if total > 0 else 0.0
        likelihood = self._likelihood
        for distance, accepted, rejected in plans:
            likelihood = _with(likelihood, distance, share * accepted, share * rejected)
        least, most = _LEAST_RATIO * self.solver, _MOST_RATIO * self.solver
        self.value = min(max(_best(likelihood), least), most)


def _with(
    likelihood: list[float], distance: float, accepted: float, rejected: float
) -> list[float]:
    """The logarithms of the likelihood of `_SLOPES`, these tokens seen too."""
    if not accepted + rejected > 0:
        return likelihood
    return [
        before
        - accepted * slope * distance
        + rejected * math.log(max(-math.expm1(-slope * distance), _LEAST_REJECTED))
        for before, slope in zip(likelihood, _SLOPES, strict=True)
    ]


def _best(likelihood: list[float]) -> float:
    return _SLOPES[max(range(len(likelihood)), key=likelihood.__getitem__)]
