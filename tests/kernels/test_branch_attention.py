# SPDX-License-Identifier: Apache-2.0
"""`branch_attention` against plain masked attention, one branch at a time."""

import pytest
import torch

from knapspec_vllm import ops
from knapspec_vllm.kernels import reference

pytestmark = pytest.mark.kernels

# float32: only the order of sums differs. bfloat16: the naive side rounds to bf16 once, as the op
# does, so results are at most one unit in the last place (2^-8 relative) of values below 4 apart.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
IMPLEMENTATIONS = {"ops": ops.branch_attention, "reference": reference.branch_attention}

# N, R, P, Hq, Hkv, D
SHAPES = [
    pytest.param(1, 1, 0, 1, 1, 32, id="one-token-no-prefix"),
    pytest.param(3, 5, 0, 4, 2, 32, id="no-prefix-gqa"),
    pytest.param(4, 16, 123, 9, 3, 64, id="smollm2-odd-prefix"),
    pytest.param(2, 7, 1, 8, 8, 32, id="one-prefix-token-mha"),
    pytest.param(5, 3, 257, 6, 1, 17, id="weird-mqa"),
    pytest.param(0, 4, 9, 4, 2, 32, id="no-branches"),
]


def inputs(n, r, p, hq, hkv, d, dtype):
    def randn(*shape):
        return torch.randn(*shape).to(dtype)

    return (
        randn(n, r, hq, d),
        randn(p, hkv, d),
        randn(p, hkv, d),
        randn(n, r, hkv, d),
        randn(n, r, hkv, d),
    )


def naive(query, prefix_key, prefix_value, tail_key, tail_value, scale, prefix_mask):
    """Each branch alone: keys concatenated, one dense mask, float32 attention."""
    n, r, hq, _ = query.shape
    p, hkv, _ = prefix_key.shape
    if prefix_mask is None:
        prefix_mask = torch.ones(r, p, dtype=torch.bool)
    mask = torch.cat([prefix_mask, torch.ones(r, r, dtype=torch.bool).tril()], dim=1)
    result = torch.empty_like(query)
    for branch in range(n):
        key = torch.cat([prefix_key, tail_key[branch]]).float().repeat_interleave(hq // hkv, 1)
        value = torch.cat([prefix_value, tail_value[branch]]).float()
        value = value.repeat_interleave(hq // hkv, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            query[branch].float().transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            attn_mask=mask,
            scale=scale,
        )
        result[branch] = out.transpose(0, 1).to(query.dtype)
    return result


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-visible", "masked"])
@pytest.mark.parametrize("n, r, p, hq, hkv, d", SHAPES)
def test_matches_naive_attention(name, dtype, masked, n, r, p, hq, hkv, d):
    tensors = inputs(n, r, p, hq, hkv, d, dtype)
    mask = torch.rand(r, p) < 0.5 if masked else None
    if masked:
        mask[0] = False  # a token that sees nothing of the prefix must not become NaN
    scale = d**-0.5
    got = IMPLEMENTATIONS[name](*tensors, scale, mask)
    want = naive(*tensors, scale, mask)
    assert got.shape == (n, r, hq, d)
    assert got.dtype is dtype
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_large_scores_do_not_overflow():
    query, *rest = inputs(2, 4, 33, 4, 2, 32, torch.float32)
    got = ops.branch_attention(query * 1e4, *rest, 1.0)
    torch.testing.assert_close(got, naive(query * 1e4, *rest, 1.0, None))


def test_branches_do_not_see_each_other():
    query, prefix_key, prefix_value, tail_key, tail_value = inputs(3, 4, 8, 4, 2, 32, torch.float32)
    before = ops.branch_attention(query, prefix_key, prefix_value, tail_key, tail_value, 0.2)
    tail_key[2] += 1.0
    tail_value[2] += 1.0
    after = ops.branch_attention(query, prefix_key, prefix_value, tail_key, tail_value, 0.2)
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    assert not torch.equal(after[2], before[2])


def test_tail_is_causal():
    query, prefix_key, prefix_value, tail_key, tail_value = inputs(2, 6, 8, 4, 2, 32, torch.float32)
    before = ops.branch_attention(query, prefix_key, prefix_value, tail_key, tail_value, 0.2)
    tail_key[:, 4] += 1.0
    tail_value[:, 4] += 1.0
    after = ops.branch_attention(query, prefix_key, prefix_value, tail_key, tail_value, 0.2)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=0)
    assert not torch.equal(after[:, 4:], before[:, 4:])


def test_non_contiguous_inputs():
    tensors = [
        t.transpose(0, -1).contiguous().transpose(0, -1)
        for t in inputs(2, 5, 11, 4, 2, 32, torch.float32)
    ]
    assert not tensors[0].is_contiguous()
    torch.testing.assert_close(ops.branch_attention(*tensors, 0.2), naive(*tensors, 0.2, None))
