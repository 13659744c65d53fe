# SPDX-License-Identifier: Apache-2.0
"""Self-SD: one skip set of attentions and MLPs, found once by Bayesian optimisation, then frozen.

After Draft & Verify (arXiv 2309.08168), which maximises the tokens per second of short generations
(8 prompts of 32 tokens) over some 1,000 iterations, hours for a 13B model. Here a candidate's
acceptance is its agreement on the reference tokens and its speed follows from the item prices, so
that candidates are tried in batches and a search takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knapspec_vllm.planner.baselines.evaluate import evaluate
from knapspec_vllm.planner.baselines.masks import SkipSpace, flipped, random_masks, unseen
from knapspec_vllm.planner.baselines.search import suggest
from knapspec_vllm.planner.objective import paper_tpt
from knapspec_vllm.planner.solver import BranchRunner, ItemWeights, SolverSettings
from knapspec_vllm.planner.types import Plan, PlanEstimate

BUDGET = 192
"""Candidates tried, once; the published search tries 1,000, one after another."""
_BATCH = 8
"""Candidates between two looks at the values: of twice as many half are wasted, and 8 branches of
the wanted reference tokens fill a GPU."""
_START = 24
"""Random candidates before the first look; more would leave less to the model."""
_MAX_DRAFT_LENGTH = 8
"""Longest draft the objective considers: longer ones pay only where acceptance is near 0.99."""


class SelfSpeculative:
    """Solves once; later calls judge the same plan on the tokens at hand."""

    name = "self_sd"
    resolve_every = None
    reference_tokens = 256

    def __init__(self, budget: int = BUDGET, seed: int = 0) -> None:
        self._budget = budget
        self._seed = seed
        self._plan: Plan | None = None

    def solve(
        self, runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
    ) -> tuple[PlanEstimate, ...]:
        """The plan, judged; empty where nothing may be skipped."""
        if self._plan is not None:
            return evaluate(runner, [self._plan], settings.live_branches)
        found = self._search(runner, weights, settings)
        if found is None:
            return ()
        self._plan = found.plan
        return (found,)

    def _search(
        self, runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
    ) -> PlanEstimate | None:
        """The best plan met within the budget."""
        space = SkipSpace.of(runner.num_layers, weights, settings)
        generator = torch.Generator().manual_seed(self._seed)
        masks = torch.empty(0, space.size, dtype=torch.bool)
        values = torch.empty(0, dtype=torch.float64)
        estimates: list[PlanEstimate] = []
        while space.size and len(masks) < self._budget:
            batch = self._propose(space, masks, values, generator)
            if not len(batch):
                break
            tried = evaluate(runner, [space.plan(mask) for mask in batch], settings.live_branches)
            saved = space.saved(batch).tolist()
            scores = [self._score(e, s, weights) for e, s in zip(tried, saved, strict=True)]
            masks = torch.cat([masks, batch])
            values = torch.cat([values, torch.tensor(scores, dtype=torch.float64)])
            estimates += tried
        return estimates[int(values.argmax())] if estimates else None

    def _propose(
        self, space: SkipSpace, masks: Tensor, values: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Up to a batch of new masks."""
        left = self._budget - len(masks)
        if len(masks) < _START:
            drawn = _spread_masks(4 * _START, space, generator)
            return unseen(space.allowed(drawn), masks)[: min(_START, left)]
        best = masks[values.argsort(descending=True, stable=True)[:8]]
        near = flipped(best.repeat(64, 1), 4, generator)
        far = _spread_masks(256, space, generator)
        candidates = unseen(space.allowed(torch.cat([near, far])), masks)
        return candidates[suggest(masks, values, candidates, min(_BATCH, left))]

    def _score(self, estimate: PlanEstimate, saved: float, weights: ItemWeights) -> float:
        """Predicted speedup at the best draft length.

        The published search times whole generations, head included: without weights.fixed_us a set
        that saves too much would look better than it is.
        """
        layers = estimate.plan.num_layers
        items_us = layers * (weights.attention_full_us + weights.mlp_us)
        # Half a token each way: 16 of 16 is no certainty.
        alpha = (estimate.hits + 0.5) / (estimate.trials + 1.0)
        draft_us = items_us * (1.0 - saved) + weights.fixed_us
        target_us = items_us + weights.fixed_us
        lengths = range(1, _MAX_DRAFT_LENGTH + 1)
        return target_us * max(paper_tpt(alpha, g, draft_us, target_us) for g in lengths)


def _spread_masks(number: int, space: SkipSpace, generator: torch.Generator) -> Tensor:
    """Random masks, as many of 1 to 2 skipped items as of 2 to 4, of 4 to 8 and so on.

    A random mask of a third of the items agrees on next to nothing: with counts drawn evenly most
    of the values would be equal and teach nothing.
    """
    exponents = torch.rand(number, generator=generator, dtype=torch.float64)
    counts = (space.size + 1.0) ** exponents
    return random_masks(counts.long().clamp(1, space.size), space.size, generator)
