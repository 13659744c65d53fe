# SPDX-License-Identifier: Apache-2.0
"""Which candidates of the solver go on, and which final plans are worth returning."""

from __future__ import annotations

import torch
from torch import Tensor

from knapspec_vllm.planner.types import PlanEstimate

EXCHANGE_RATE = 0.1
"""Cosine that one whole target's item time is worth when candidates of one bin are compared.

Without it executing wins every bin wider than the item, as it always has the higher cosine, and an
item that could be skipped for free never is. Rates from 0.05 to 0.3 measure alike.
"""
_TOLERANCE = 1e-7
"""Differences of saving or error below this are rounding."""


def select(saved: Tensor, error: Tensor, allowed: Tensor, live: int) -> tuple[Tensor, Tensor]:
    """Picks the candidates that go on: the best of each of `live` ranges of time saved.

    saved: [M] float32, share of the item time; error: [M] float32, 1 - cosine; allowed: [M] bool.
    Returns indices [live] int64 and whether each is a live branch [live] bool. The ranges divide
    what is saved at this depth, not at the end: early on, branches differ by a few items only.
    Ranges without a candidate are given to the best remaining ones. Dominated candidates are
    dropped, the later of two equal ones too. Fixed shapes, ties go to the lower index.
    """
    number = saved.shape[0]
    allowed = allowed & ~_dominated(saved, error, allowed)
    lowest = torch.full_like(saved, -torch.inf)
    score = torch.where(allowed, EXCHANGE_RATE * saved - error, lowest)
    reach = torch.where(allowed, saved, torch.zeros_like(saved)).amax().clamp_min(_TOLERANCE)
    bin_of = (saved / reach * live).long().clamp_(0, live - 1)
    # Best first; then a candidate leads its bin if none before it has the same bin.
    order = torch.sort(score, descending=True, stable=True).indices
    same = bin_of[order].unsqueeze(1) == bin_of[order].unsqueeze(0)
    leads = same.tril(-1).any(dim=1).logical_not() & allowed[order]
    ranks = torch.arange(number, device=saved.device)
    ranks = torch.where(leads, ranks, torch.where(allowed[order], number, 2 * number) + ranks)
    chosen = order[torch.sort(ranks, stable=True).indices]
    if number < live:  # fewer candidates than branches: repeat the last, dead
        chosen = torch.cat([chosen, chosen[-1:].expand(live - number)])
        fresh = torch.arange(live, device=saved.device) < number
        return chosen, allowed[chosen] & fresh
    chosen = chosen[:live]
    return chosen, allowed[chosen]


def _dominated(saved: Tensor, error: Tensor, allowed: Tensor) -> Tensor:
    """[M]: another allowed candidate saves at least as much with no more error."""
    index = torch.arange(saved.shape[0], device=saved.device)
    more, less = saved.unsqueeze(0) - saved.unsqueeze(1), error.unsqueeze(0) - error.unsqueeze(1)
    as_good = (more >= -_TOLERANCE) & (less <= _TOLERANCE) & allowed.unsqueeze(0)
    better = (more > _TOLERANCE) | (less < -_TOLERANCE)
    before = index.unsqueeze(0) < index.unsqueeze(1)
    return (as_good & (better | before)).any(dim=1)


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
