# SPDX-License-Identifier: Apache-2.0
"""The host side and the second stage that both attention kernels share."""

import math

import pytest
import torch

from knapspec_vllm.kernels.attention_parts import reduce_splits, split_count
from tests.helpers_kernels import assert_close

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("splits, dim", [(1, 32), (5, 17), (16, 64), (37, 256)])
def test_reduce_splits(device, splits, dim):
    """The second stage alone: used, empty (uninitialised) and missing splits."""
    maximum = torch.randn(3, 2, splits, device=device) * 20
    maximum[0, 0, splits // 2 :] = -math.inf
    maximum[1] = -math.inf
    total = torch.rand(3, 2, splits, device=device) + 0.5
    partial = torch.randn(3, 2, splits, dim, device=device)
    weight = torch.exp2(maximum.double() - maximum.double().amax(-1, keepdim=True).clamp(min=-1e9))
    want = (weight[..., None] * partial).sum(-2)
    want = want / (weight * total).sum(-1, keepdim=True).clamp(min=1e-300)
    total[maximum == -math.inf] = 0.0
    partial[maximum == -math.inf] = math.nan
    out = torch.full((3, 2, dim), 7.0, device=device)
    reduce_splits(partial, maximum, total, out)
    assert_close("out", want, out, 1e-5)


def test_split_count_leaves_no_wave_and_no_tile_half_empty():
    # 8 multiprocessors under the interpreter: 24 programs at a time.
    def count(programs, tokens, tile=32, piece=128):
        return split_count(programs, tokens, tile, piece, 3, torch.device("cpu"))

    assert count(1, 24 * 320) == 24, "one wave, ten tiles each"
    assert count(1, 10 * 320) == 20, "five tiles each: 24 splits would have five, too"
    assert count(5, 32_000) == 14, "70 programs of three waves' 72"
    assert count(3, 200) == 2, "no split below 128 tokens"
    assert count(3, 200, piece=512) == 1
    assert count(3, 0) == 1
    assert count(24, 8_000) == 1, "the grid fills the device"
    assert count(33, 8_000) == 5, "165 programs of seven waves' 168"
    assert count(960, 8_000) == 1, "the last of many waves does not matter"
    assert count(33, 40_000) >= 3, "nobody reads more than 16k tokens"
    assert count(0, 0) == 1
