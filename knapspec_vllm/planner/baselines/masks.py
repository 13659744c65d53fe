# SPDX-License-Identifier: Apache-2.0
"""Skip masks: sets of skipped items as rows of bools, and ways to draw them.

Masks live on the host: there are some hundred of them with some hundred bits each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knapspec_vllm.planner.solver import ItemWeights, SolverSettings
from knapspec_vllm.planner.types import Mode, Plan


@dataclass(frozen=True, eq=False)
class SkipSpace:
    """The D items that may be skipped: all of the layers that are not kept."""

    num_layers: int
    first_item: int
    # [D] float64, share of the target's item time that skipping each saves
    shares: Tensor
    max_saving: float

    @classmethod
    def of(cls, num_layers: int, weights: ItemWeights, settings: SolverSettings) -> SkipSpace:
        """Raises ValueError for weights that leave nothing to save."""
        pair = [weights.attention_full_us, weights.mlp_us]
        total_us = num_layers * sum(pair)
        if min(pair) < 0 or not total_us > 0:
            raise ValueError(f"item weights must not be negative nor all zero, got {weights}")
        free = num_layers - settings.keep_first_layers - settings.keep_last_layers
        shares = torch.tensor(pair * max(free, 0), dtype=torch.float64) / total_us
        return cls(num_layers, 2 * settings.keep_first_layers, shares, settings.max_saving)

    @property
    def size(self) -> int:
        """D."""
        return len(self.shares)

    def saved(self, masks: Tensor) -> Tensor:
        """[n, D] -> [n] float64, share of the target's item time."""
        return masks.double() @ self.shares

    def allowed(self, masks: Tensor) -> Tensor:
        """Those of the masks that save something, and no more than max_saving."""
        saved = self.saved(masks)
        return masks[(saved > 0) & (saved <= self.max_saving + 1e-9)]

    def plan(self, mask: Tensor) -> Plan:
        """[D] bool -> plan."""
        modes = [Mode.FULL] * (2 * self.num_layers)
        for item in mask.nonzero().flatten().tolist():
            modes[self.first_item + item] = Mode.SKIP
        return Plan(tuple(modes))


def random_masks(counts: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[n] numbers of skipped items -> [n, size] bool, items drawn evenly."""
    return _ranks(torch.rand(len(counts), size, generator=generator)) < counts[:, None]


def flipped(masks: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Every mask with 1 to `most` items flipped."""
    counts = torch.randint(1, most + 1, (len(masks),), generator=generator)
    return masks ^ random_masks(counts, masks.shape[1], generator)


def swapped(masks: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Every mask with 1 to `most` skipped items run instead, and as many others skipped."""
    skipped = masks.sum(dim=1)
    possible = torch.minimum(skipped, masks.shape[1] - skipped)
    counts = torch.randint(1, most + 1, (len(masks),), generator=generator)
    counts = torch.minimum(counts, possible)[:, None]
    draw = torch.rand(masks.shape, generator=generator)
    # The other kind ranks behind all of this kind.
    leaving = _ranks(draw + (~masks).float()) < counts
    entering = _ranks(draw + masks.float()) < counts
    return masks ^ (leaving | entering)


def even_mask(count: int, size: int) -> Tensor:
    """[size] bool: both items of evenly spaced layers, `count` items in all."""
    pairs = size // 2
    layers = (count + 1) // 2
    mask = torch.zeros(size, dtype=torch.bool)
    for index in range(layers):
        layer = (2 * index + 1) * pairs // (2 * layers)
        mask[2 * layer : 2 * layer + 2] = True
    if count % 2:
        mask[2 * layer + 1] = False
    return mask


def unseen(masks: Tensor, seen: Tensor) -> Tensor:
    """The distinct rows of masks that are not rows of seen, in their order."""
    known = {tuple(row) for row in seen.tolist()}
    kept = []
    for index, row in enumerate(masks.tolist()):
        if tuple(row) not in known:
            known.add(tuple(row))
            kept.append(index)
    return masks[kept]


def _ranks(values: Tensor) -> Tensor:
    """Position of each value in its ascending row."""
    return values.argsort(dim=1).argsort(dim=1)
