# SPDX-License-Identifier: Apache-2.0
"""SWIFT: skip sets searched while serving, on the newest text, until they are good enough.

After arXiv 2410.06916: at a given skip ratio, sets of attentions and MLPs are proposed at random
and by Bayesian optimisation, judged by how many tokens of the context they would have drafted
right, and the best one drafts. The published code tries one set every step, remembers the score
that the best had once, and has one ratio for all models; here a batch is tried every SOLVE_EVERY
rounds (the same rate), the best is judged anew on the same tokens as its challengers, and several
ratios are searched side by side, for the policy to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from knapspec_vllm.planner.baselines.evaluate import evaluate
from knapspec_vllm.planner.baselines.masks import (
    SkipSpace,
    even_mask,
    random_masks,
    swapped,
    unseen,
)
from knapspec_vllm.planner.baselines.search import suggest
from knapspec_vllm.planner.solver import BranchRunner, ItemWeights, SolverSettings
from knapspec_vllm.planner.types import PlanEstimate

SKIP_RATIOS = (0.1, 0.2, 0.3, 0.45)
"""Shares of the skippable items; the published one for 13B models is the last."""
SOLVE_EVERY = 32
"""Rounds between batches."""
CANDIDATES = 28
"""New sets a batch, over all ratios: with the four best one full batch of 32, one a round."""
MAX_SOLVES = 31
"""Batches until the search ends: the published bound of 1,000 steps."""
MAX_SCORE = 0.95
"""Agreement at which a ratio's search ends, as published."""


@dataclass(eq=False)
class _Level:
    """The search at one skip ratio."""

    skipped: int
    """Items."""
    masks: Tensor
    """[n, D] bool, tried so far."""
    scores: list[float] = field(default_factory=list)
    """Agreement of each, on the tokens it was tried on."""
    best: Tensor | None = None
    """[D] bool."""
    done: bool = False

    def propose(self, space: SkipSpace, count: int, generator: torch.Generator) -> Tensor:
        """[<= count, D] masks not tried before: half of them random, half by model.

        The published code asks its model every 25th time, to spare the model's own time; here that
        time is small beside a batch.
        """
        many = torch.full((256,), self.skipped)
        random = random_masks(many, space.size, generator)
        if not self.scores:
            # Evenly spaced layers are where the published search starts.
            even = even_mask(self.skipped, space.size).unsqueeze(0)
            return unseen(space.allowed(torch.cat([even, random])), self.masks)[:count]
        fresh = unseen(space.allowed(random), self.masks)
        drawn = fresh[: count - count // 2]
        scores = torch.tensor(self.scores, dtype=torch.float64)
        top = self.masks[scores.argsort(descending=True, stable=True)[:4]]
        near = space.allowed(swapped(top.repeat(64, 1), 3, generator))
        candidates = unseen(torch.cat([near, fresh]), torch.cat([self.masks, drawn]))
        picked = suggest(self.masks, scores, candidates, count - len(drawn))
        return torch.cat([drawn, candidates[picked]])


class Swift:
    """Searches in every solve until each ratio's set is good enough or MAX_SOLVES are spent."""

    name = "swift"
    reference_tokens = 32

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._levels: list[_Level] | None = None
        self._solves = 0

    @property
    def resolve_every(self) -> int | None:
        """None once the search is over."""
        return None if self._over else SOLVE_EVERY

    @property
    def _over(self) -> bool:
        if self._levels is None:
            return False
        return self._solves >= MAX_SOLVES or all(level.done for level in self._levels)

    def solve(
        self, runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
    ) -> tuple[PlanEstimate, ...]:
        """The best set of every ratio so far, judged on the runner's tokens."""
        space = SkipSpace.of(runner.num_layers, weights, settings)
        if self._levels is None:
            self._levels = _levels(space)
        open_levels = [] if self._over else [level for level in self._levels if not level.done]
        share = CANDIDATES // max(len(open_levels), 1)
        trials: list[tuple[_Level, Tensor, bool]] = []
        for level in self._levels:
            if level.best is not None:
                trials.append((level, level.best, False))
            if level in open_levels:
                fresh = level.propose(space, share, self._generator)
                trials += [(level, mask, True) for mask in fresh]
        plans = [space.plan(mask) for _, mask, _ in trials]
        estimates = evaluate(runner, plans, settings.live_branches)
        self._solves += 1
        best: dict[_Level, tuple[Tensor, PlanEstimate]] = {}
        for (level, mask, is_new), found in zip(trials, estimates, strict=True):
            _consider(level, mask, is_new, found, best)
        for level, (mask, _) in best.items():
            level.best = mask
        ranked = sorted(best.values(), key=lambda entry: float(space.saved(entry[0])))
        return tuple(found for _, found in ranked)


def _consider(
    level: _Level,
    mask: Tensor,
    is_new: bool,
    found: PlanEstimate,
    best: dict[_Level, tuple[Tensor, PlanEstimate]],
) -> None:
    """Notes a trial; it becomes the best of its level if better on these tokens.

    A level's best so far comes before its challengers and stays when equal. Cosine decides among
    equal hits: few tokens have many ties.
    """
    score = found.hits / max(found.trials, 1)
    if is_new:
        level.masks = torch.cat([level.masks, mask.unsqueeze(0)])
        level.scores.append(score)
    elif score >= MAX_SCORE:
        # Good on tokens it was not picked for; a new set's score is the luckiest of many.
        level.done = True
    known = best.get(level)
    if known is None or (
        not level.done and (found.hits, found.cosine) > (known[1].hits, known[1].cosine)
    ):
        best[level] = (mask, found)


def _levels(space: SkipSpace) -> list[_Level]:
    counts = {round(ratio * space.size) for ratio in SKIP_RATIOS} - {0}
    empty = torch.empty(0, space.size, dtype=torch.bool)
    return [_Level(count, empty) for count in sorted(counts)]
