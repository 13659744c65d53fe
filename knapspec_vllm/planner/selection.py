# SPDX-License-Identifier: Apache-2.0
"""Which plans of a solve are worth returning; which candidates go on is `ops.dp_relax`'s."""

from __future__ import annotations

from collections.abc import Sequence

from knapspec_vllm.planner.curves import isotonic
from knapspec_vllm.planner.types import PlanEstimate

EXCHANGE_RATE = 0.03
"""Cosine that one whole target's item time is worth when candidates of one bin are compared.

Without it executing wins every bin wider than the item, as it always has the higher cosine, and an
item that could be skipped for free never is. Rates from 0.03 to 0.3 measure alike.
"""


def pareto(found: list[tuple[float, PlanEstimate]], bins: int) -> tuple[PlanEstimate, ...]:
    """Undominated (saving, estimate) pairs by ascending saving, at most `bins` of them.

    Dominated: another saves at least as much with as high a cosine. Hits do not count: over a few
    dozen tokens they say less about unseen text than the cosine does (picking by them costs 0.02
    of agreement on average, SmolLM2, 18 texts). Where more than `bins` remain, equal ranges of
    saving keep their highest cosine.
    """
    kept: list[tuple[float, PlanEstimate]] = []
    for saving, estimate in sorted(found, key=_by_saving, reverse=True):
        if not kept or estimate.cosine > kept[-1][1].cosine:
            kept.append((saving, estimate))
    kept.reverse()
    if len(kept) > bins:
        top = kept[-1][0]
        best: dict[int, tuple[float, PlanEstimate]] = {}
        for saving, estimate in kept:  # cosines fall: the first of a range has the highest
            best.setdefault(min(int(bins * saving / top), bins - 1), (saving, estimate))
        kept = [best[level] for level in sorted(best)]
    return tuple(estimate for _, estimate in kept)


def smoothed_hits(estimates: Sequence[PlanEstimate]) -> list[float]:
    """Hits of the plans of a frontier, in its order, made non-increasing.

    Plans that save more agree less, so where a plan has more hits than a lighter one, both were a
    matter of luck: neighbours share their hits then (isotonic regression). Of many plans the
    luckiest would otherwise be chosen.
    """
    if len({estimate.trials for estimate in estimates}) > 1:
        return [float(estimate.hits) for estimate in estimates]
    return isotonic(float(estimate.hits) for estimate in reversed(estimates))[::-1]


def _by_saving(entry: tuple[float, PlanEstimate]) -> tuple[float, float, int]:
    return entry[0], entry[1].cosine, entry[1].hits
