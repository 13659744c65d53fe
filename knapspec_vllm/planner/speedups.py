# SPDX-License-Identifier: Apache-2.0
"""Predicted speedup of every plan and draft length for one batch, as plain tuples of floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knapspec_vllm.planner.costs import CostModel, DraftPrices
from knapspec_vllm.planner.types import Batch, Plan


@dataclass(frozen=True)
class Rates:
    """Everything about a batch that its speedups need, except acceptance. Microseconds at the pace
    of the cost curves: what all parts of a round share cancels in a speedup."""

    lengths: tuple[int, ...]
    """Draft lengths considered: consecutive, all > 0."""
    prices: DraftPrices
    plain_us: float
    """What a speedup of 1 is: a plain decode step, overhead included."""
    verify_us: tuple[float, ...]
    """Target step of each length, round overhead included; rows without room feed it less."""
    shares: tuple[float, ...]
    """Of the rows that may draft a token at each position, up to the longest length."""
    paper: bool
    """The published objective: no fixed part, no corrections, verify costs one step."""
    draft: float = 1.0
    """What a draft forward takes over what the curves say."""
    kept: float = 1.0
    """Drafted tokens that verification keeps over those that acceptance promises."""

    @classmethod
    def of(
        cls,
        costs: CostModel,
        batch: Batch,
        lengths: tuple[int, ...],
        *,
        paper: bool = False,
        plain: float = 1.0,
        verify: float = 1.0,
        draft: float = 1.0,
        round_us: float = 0.0,
        kept: float = 1.0,
    ) -> Rates:
        """plain, verify, draft: `Corrections.relative` of the parts of a round.

        round_us: what a speculative round costs on top. kept: see AcceptanceModel.kept.
        """
        prices = costs.prices(batch)
        room = batch.room or (1.0,) * lengths[-1]
        shares = (*room, *(0.0,) * lengths[-1])[: lengths[-1]]
        if paper:
            target_us = prices.target_items_us
            verify_us = (target_us,) * len(lengths)
            return cls(lengths, prices, target_us, verify_us, shares, paper)
        plain_us = plain * costs.step_us(batch, 1)
        fed = [1.0 + sum(shares[:n]) for n in lengths]
        verify_us = tuple(verify * costs.step_us(batch, n) + round_us for n in fed)
        return cls(lengths, prices, plain_us, verify_us, shares, paper, draft, kept)

    def draft_us(self, items_us: float) -> float:
        """A draft forward whose items cost items_us."""
        return items_us if self.paper else self.draft * (self.prices.fixed_us + items_us)

    def row(self, alpha: float, draft_us: float) -> tuple[float, ...]:
        """Speedup of each length: TPT times the time of a plain step.

        Where all rows have room and all that is promised is kept, equals
        objective.throughput_tpt (or paper_tpt) for every length, with E[tokens] carried from
        length to length: this runs for every plan whenever the batch changes.
        """
        first, plain_us, verify_us = self.lengths[0], self.plain_us, self.verify_us
        gained, chance, found = 1.0, 1.0, []
        for length, share in enumerate(self.shares, 1):
            chance *= alpha
            gained += self.kept * chance * share
            if length >= first:
                time_us = length * draft_us + verify_us[length - first]
                found.append(gained * plain_us / time_us)
        return tuple(found)


@dataclass(frozen=True)
class SpeedupTable:
    """Rows: plans. Columns: rates.lengths."""

    rates: Rates
    draft_us: tuple[float, ...]
    """One draft forward of each plan."""
    saved: tuple[float, ...]
    """Share of the item time each plan saves."""
    alphas: tuple[float, ...]
    speedups: tuple[tuple[float, ...], ...]
    best: tuple[int, int]
    """(row, column) of the largest speedup; the first of equals."""

    @classmethod
    def of(cls, rates: Rates, plans: Sequence[Plan], alphas: Sequence[float]) -> SpeedupTable:
        """Evaluates plans (at least one) with these acceptances."""
        target_us = max(rates.prices.target_items_us, 1e-9)
        items_us = [rates.prices.items_us(plan) for plan in plans]
        draft_us = tuple(rates.draft_us(item_us) for item_us in items_us)
        speedups = tuple(
            rates.row(alpha, time_us) for alpha, time_us in zip(alphas, draft_us, strict=True)
        )
        tops = [max(row) for row in speedups]
        index = max(range(len(tops)), key=tops.__getitem__)
        return cls(
            rates=rates,
            draft_us=draft_us,
            saved=tuple(1.0 - item_us / target_us for item_us in items_us),
            alphas=tuple(alphas),
            speedups=speedups,
            best=(index, speedups[index].index(tops[index])),
        )
