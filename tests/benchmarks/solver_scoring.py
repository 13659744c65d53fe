# SPDX-License-Identifier: Apache-2.0
"""What a frontier is worth: predicted speedup, and agreement on text its solver has not seen.

Three ways to price a frontier:
- predicted: the best plan and draft length by the agreement believed, priced with it;
- choice: that same plan and length, priced with its agreement on the stretch behind the window;
- known: the best plan and length had the agreement on the stretch been known.
Two rules of what to believe (RULES), to be compared like with like: the solver's own agreement of
every plan, as published, shrunk by a Beta prior of fixed mean and weight; or what our planner
believes of the same plans. Agreement on the stretch is used as it is.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.planner.acceptance import NEUTRAL_ALPHA, AcceptanceModel
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.curves import Curve
from knapspec_vllm.planner.selection import pareto
from knapspec_vllm.planner.solver import ItemWeights
from knapspec_vllm.planner.speedups import Rates, SpeedupTable
from knapspec_vllm.planner.types import Batch, Mode, Plan, PlanEstimate

LEVELS = (0.1, 0.2, 0.3)
"""Shares of item time saved at which agreement is compared."""
LENGTHS = tuple(range(1, 9))
_EPSILON = 1e-6
_PUBLISHED_WEIGHT = 8.0

# SmolLM2-135M, one row of 0.2k tokens, vLLM CPU 0.32, bf16, eager, two AVX-512/AMX cores. Engine
# step by tokens per row, and one draft forward of everything, of which the head (21% of the bytes)
# is fixed; attention to MLP is 1 to 3.
_STEPS_US = {1: 26e3, 2: 28e3, 3: 28e3, 4: 32e3, 5: 30e3, 7: 31e3, 9: 32e3}
_DRAFT_US, _FIXED_SHARE, _LAYERS = 24e3, 0.21, 30


def default_costs() -> CostModel:
    """Measured costs of the benchmark's model."""

    def flat(time_us: float) -> Curve:
        return Curve((1,), (time_us,), (0.0,))

    layer_us = _DRAFT_US * (1.0 - _FIXED_SHARE) / _LAYERS
    return CostModel(
        num_layers=_LAYERS,
        window_tokens=576,
        steps=tuple((tokens, flat(time_us)) for tokens, time_us in _STEPS_US.items()),
        fixed=flat(_DRAFT_US * _FIXED_SHARE),
        attention=flat(layer_us / 4),
        attention_window=flat(layer_us / 4),
        mlp=flat(layer_us * 3 / 4),
    )


def read_costs(file: Path | None, split: Sequence[float] | None) -> CostModel:
    """Costs of a JSON file (CostModel.to_json) or the default ones.

    split: (attention, MLP), any unit; how the items' time is divided instead. Windows then save
    nothing.
    """
    costs = CostModel.from_json(json.loads(file.read_text())) if file else default_costs()
    if split is None:
        return costs
    batch = Batch(1, 256)
    prices = costs.prices(batch)
    layer_us = (prices.attention_us + prices.mlp_us) / sum(split)
    attention, mlp = (Curve((1,), (layer_us * part,), (0.0,)) for part in split)
    fields = {name: getattr(costs, name) for name in ("num_layers", "window_tokens", "steps")}
    return CostModel(
        **fields, fixed=costs.fixed, attention=attention, attention_window=attention, mlp=mlp
    )


@dataclass(frozen=True)
class Pricing:
    """Costs of one window's batch: a single row."""

    weights: ItemWeights
    rates: dict[str, Rates]
    """By objective: "throughput" (the product's) and "paper" (the published one)."""

    @classmethod
    def of(cls, costs: CostModel, context_tokens: int) -> Pricing:
        batch = Batch(1, context_tokens)
        weights = ItemWeights(
            attention_full_us=costs.item_us("attention", Mode.FULL, batch),
            attention_window_us=costs.item_us("attention", Mode.WINDOW, batch),
            mlp_us=costs.item_us("mlp", Mode.FULL, batch),
        )
        rates = {
            objective: Rates.of(costs, batch, LENGTHS, paper=objective == "paper")
            for objective in ("throughput", "paper")
        }
        return cls(weights, rates)

    def saved(self, plan: Plan) -> float:
        """Share of the item time, at exact costs."""
        prices = self.rates["throughput"].prices
        return 1.0 - prices.items_us(plan) / prices.target_items_us


@dataclass(frozen=True)
class Ranked:
    """Plans of a solver, and how much of each is believed."""

    estimates: list[PlanEstimate]
    alphas: list[float]
    """Agreement with the prior: hits of 16 or 48 tokens do not weigh the same."""

    @classmethod
    def as_published(cls, estimates: Sequence[PlanEstimate], _: Pricing) -> Ranked:
        """Every plan at its own agreement."""
        return cls(list(estimates), [_shrunk(e.hits, e.trials) for e in estimates])

    @classmethod
    def as_planned(cls, estimates: Sequence[PlanEstimate], pricing: Pricing) -> Ranked:
        """As our planner does: undominated in saving and cosine, before anything is verified."""
        pairs = [(pricing.saved(estimate.plan), estimate) for estimate in estimates]
        frontier = pareto(pairs, max(len(pairs), 1))
        acceptance = AcceptanceModel(KnapSpecConfig().prior_weight)
        acceptance.priors(frontier)
        return cls(list(frontier), [acceptance.alpha(estimate.plan) for estimate in frontier])

    def at_level(self, pricing: Pricing, level: float) -> PlanEstimate | None:
        """The best plan, by belief and then cosine, that saves at least `level`."""
        enough = [
            (alpha, estimate.cosine, number)
            for number, (alpha, estimate) in enumerate(
                zip(self.alphas, self.estimates, strict=True)
            )
            if pricing.saved(estimate.plan) >= level - _EPSILON
        ]
        return self.estimates[max(enough)[2]] if enough else None


RULES = {"published": Ranked.as_published, "planned": Ranked.as_planned}


def _shrunk(hits: float, trials: int) -> float:
    return (hits + _PUBLISHED_WEIGHT * NEUTRAL_ALPHA) / (trials + _PUBLISHED_WEIGHT)


def needed(estimates: Sequence[PlanEstimate], pricing: Pricing) -> list[Plan]:
    """Plans that have to be judged for everything but "known"."""
    plans: list[Plan] = []
    for rule in RULES.values():
        ranked = rule(estimates, pricing)
        picked = [ranked.at_level(pricing, level) for level in LEVELS]
        plans += [estimate.plan for estimate in picked if estimate is not None]
        for rates in pricing.rates.values():
            plan, _, _ = _best(rates, ranked.estimates, ranked.alphas)
            plans += [] if plan is None else [plan]
    return plans


def _best(
    rates: Rates, estimates: Sequence[PlanEstimate], alphas: Sequence[float]
) -> tuple[Plan | None, int, float]:
    """(plan, draft length, predicted speedup) of a frontier; no plan at all is worth 1."""
    if not estimates:
        return None, 0, 1.0
    table = SpeedupTable.of(rates, [e.plan for e in estimates], alphas)
    row, column = table.best
    return estimates[row].plan, rates.lengths[column], table.speedups[row][column]


def score(
    estimates: Sequence[PlanEstimate], pricing: Pricing, judged: dict[Plan, float], rule: str
) -> dict[str, float]:
    """Figures of one frontier on one window. judged: agreement of plans on the stretch.

    rule: of RULES. "known" is left out unless every plan was judged. A level that no plan reaches
    is nan.
    """
    ranked = RULES[rule](estimates, pricing)
    figures: dict[str, float] = {}
    for level in LEVELS:
        picked = ranked.at_level(pricing, level)
        figures[f"agreement at {level:.0%}"] = judged[picked.plan] if picked else math.nan
    for objective, rates in pricing.rates.items():
        plan, length, speedup = _best(rates, ranked.estimates, ranked.alphas)
        figures[f"{objective} speedup, predicted"] = speedup
        if plan is not None:
            draft_us = rates.draft_us(rates.prices.items_us(plan))
            speedup = rates.row(judged[plan], draft_us)[rates.lengths.index(length)]
        figures[f"{objective} speedup, choice"] = speedup
        if all(e.plan in judged for e in estimates):
            alphas = [judged[e.plan] for e in estimates]
            figures[f"{objective} speedup, known"] = _best(rates, estimates, alphas)[2]
    return figures


@dataclass(frozen=True)
class Paired:
    """Means of two solvers over windows, and their difference with its standard error."""

    ours: float
    published: float
    difference: float
    standard_error: float
    windows: int

    @classmethod
    def of(cls, ours: Sequence[float], published: Sequence[float]) -> Paired:
        """Windows where either figure is missing (nan) are left out."""
        pairs = [
            pair
            for pair in zip(ours, published, strict=True)
            if not any(math.isnan(value) for value in pair)
        ]
        if not pairs:
            return cls(math.nan, math.nan, math.nan, math.nan, 0)
        gaps = [a - b for a, b in pairs]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        return cls(
            statistics.mean(a for a, _ in pairs),
            statistics.mean(b for _, b in pairs),
            statistics.mean(gaps),
            error,
            len(pairs),
        )
