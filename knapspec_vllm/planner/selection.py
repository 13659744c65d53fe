# SPDX-License-Identifier: Apache-2.0
"""Which plans of a solve are worth returning; which candidates go on is `ops.dp_relax`'s."""

from __future__ import annotations

from knapspec_vllm.planner.types import PlanEstimate

EXCHANGE_RATE = 0.1
"""Cosine that one whole target's item time is worth when candidates of one bin are compared.

Without it executing wins every bin wider than the item, as it always has the higher cosine, and an
item that could be skipped for free never is. Rates from 0.05 to 0.3 measure alike.
"""


def pareto(found: list[tuple[float, PlanEstimate]], bins: int) -> tuple[PlanEstimate, ...]:
    """Undominated (saving, estimate) pairs by ascending saving, at most `bins` of them.

    Dominated: another saves at least as much, hits as often and has as high a cosine. Where more
    than `bins` remain, equal ranges of saving keep their best (hits, then cosine).
    """
    kept: list[tuple[float, PlanEstimate]] = []
    for saving, estimate in sorted(found, key=_by_saving, reverse=True):
        if not any(e.hits >= estimate.hits and e.cosine >= estimate.cosine for _, e in kept):
            kept.append((saving, estimate))
    kept.reverse()
    if len(kept) > bins:
        top = kept[-1][0]
        best: dict[int, tuple[float, PlanEstimate]] = {}
        for saving, estimate in kept:
            level = min(int(bins * saving / top), bins - 1)
            if level not in best or _merit(estimate) >= _merit(best[level][1]):
                best[level] = (saving, estimate)
        kept = [best[level] for level in sorted(best)]
    return tuple(estimate for _, estimate in kept)


def _by_saving(entry: tuple[float, PlanEstimate]) -> tuple[float, int, float]:
    return entry[0], entry[1].hits, entry[1].cosine


def _merit(estimate: PlanEstimate) -> tuple[int, float]:
    return estimate.hits, estimate.cosine
