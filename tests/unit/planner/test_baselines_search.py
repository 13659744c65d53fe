# SPDX-License-Identifier: Apache-2.0
"""Skip masks and the Bayesian search over them."""

import itertools

import pytest
import torch

from knapspec_vllm.planner.baselines.masks import (
    SkipSpace,
    even_mask,
    flipped,
    random_masks,
    swapped,
    unseen,
)
from knapspec_vllm.planner.baselines.search import NOISE, kernel, posterior, suggest
from knapspec_vllm.planner.solver import ItemWeights, SolverSettings
from knapspec_vllm.planner.types import Plan

WEIGHTS = ItemWeights(attention_full_us=40.0, attention_window_us=25.0, mlp_us=60.0)


def drawn(number, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, size, generator=generator) < 0.3


def test_posterior_is_the_textbook_one():
    masks, candidates = drawn(9, 20, 1), drawn(5, 20, 2)
    values = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)
    inverse = torch.linalg.inv(kernel(masks, masks) + NOISE * torch.eye(9, dtype=torch.float64))
    cross = kernel(masks, candidates)
    mean, covariance = posterior(masks, values, candidates)
    assert torch.allclose(mean, cross.T @ inverse @ values)
    assert torch.allclose(covariance, kernel(candidates, candidates) - cross.T @ inverse @ cross)


def test_kernel_falls_with_the_number_of_differing_items():
    masks = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    row = kernel(masks, masks)[0]
    assert row[0] == 1.0
    assert row[1] < 1.0
    assert row[1] == pytest.approx(float(row[2]) ** 0.5)
    assert row[2] == row[3]


def test_picks_of_one_batch_are_no_twins():
    masks = drawn(20, 16, 3)
    values = masks.double().sum(dim=1)
    candidates = drawn(40, 16, 4)
    (best,) = suggest(masks, values, candidates, 1)
    candidates = torch.cat([candidates, candidates[best].repeat(3, 1)])
    picked = suggest(masks, values, candidates, 4)
    assert len({tuple(candidates[index].tolist()) for index in picked}) == 4
    assert suggest(masks, values, candidates, 99) != list(range(43))
    assert sorted(suggest(masks, values, candidates, 99)) == list(range(43))  # each once


def test_finds_better_masks_than_chance():
    """Sixteen items of random worth, two pairs that only pay together; 64 looks of 65,536.

    The best of 64 random masks would have some 700 better ones.
    """
    everything = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1 == 1
    better = []
    for seed in range(7):
        generator = torch.Generator().manual_seed(seed)
        worth = torch.randn(16, generator=generator, dtype=torch.float64)

        def value(masks, worth=worth):
            pairs = (masks[:, 0] & masks[:, 1]).double() + (masks[:, 2] & masks[:, 3]).double()
            return masks.double() @ worth + 2.0 * pairs

        masks = random_masks(torch.full((16,), 8), 16, generator)
        while len(masks) < 64:
            near = flipped(masks[value(masks).argsort()[-4:]].repeat(32, 1), 3, generator)
            candidates = unseen(near, masks)
            masks = torch.cat([masks, candidates[suggest(masks, value(masks), candidates, 8)]])
        better.append(int((value(everything) > value(masks).max()).sum()))
    assert sorted(better)[3] == 0
    assert max(better) < 200


def test_changed_masks_keep_what_they_should():
    generator = torch.Generator().manual_seed(0)
    masks = random_masks(torch.tensor([1, 3, 11, 12] * 8), 12, generator)
    assert masks.sum(dim=1).tolist() == [1, 3, 11, 12] * 8
    changed = (flipped(masks, 3, generator) ^ masks).sum(dim=1)
    assert set(changed.tolist()) == {1, 2, 3}
    moved = swapped(masks, 3, generator)
    assert torch.equal(moved.sum(dim=1), masks.sum(dim=1))
    differing = (moved ^ masks).sum(dim=1)
    assert set(differing[masks.sum(dim=1) == 3].tolist()) == {2, 4, 6}
    assert set(differing[masks.sum(dim=1) == 11].tolist()) == {2}
    assert set(differing[masks.sum(dim=1) == 12].tolist()) == {0}  # nothing to swap with


@pytest.mark.parametrize("count", [1, 2, 5, 10, 11, 20])
def test_even_mask(count):
    mask = even_mask(count, 20)
    assert int(mask.sum()) == count
    layers = mask.view(10, 2).any(dim=1).nonzero().flatten().tolist()
    assert len(layers) == (count + 1) // 2
    gaps = [b - a for a, b in itertools.pairwise(layers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_unseen():
    seen = torch.tensor([[1, 0], [0, 0]]).bool()
    masks = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 1]]).bool()
    assert unseen(masks, seen).tolist() == [[False, True], [True, True]]


def test_space_prices_limits_and_places_masks():
    settings = SolverSettings(keep_first_layers=2, keep_last_layers=1, max_saving=0.2)
    space = SkipSpace.of(5, WEIGHTS, settings)
    masks = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    assert space.saved(masks).tolist() == pytest.approx([0.0, 0.08, 0.24, 0.2])
    assert torch.equal(space.allowed(masks), masks[[1, 3]])
    assert space.plan(masks[2]) == Plan.parse("skip mlp:2,3", 5)


def test_space_refuses_impossible_weights():
    with pytest.raises(ValueError, match="item weights"):
        SkipSpace.of(4, ItemWeights(0.0, 0.0, 0.0), SolverSettings())
