# SPDX-License-Identifier: Apache-2.0
"""`greedy_confidence` against torch's softmax."""

import pytest
import torch

from knapspec_vllm import ops

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows, vocabulary", [(0, 7), (1, 1), (5, 123), (3, 49152)])
def test_matches_softmax(rows, vocabulary, dtype):
    logits = (torch.randn(rows, vocabulary) * 5).to(dtype)
    token_ids, probability = ops.greedy_confidence(logits)
    assert token_ids.dtype is torch.int64
    assert probability.dtype is torch.float32
    assert token_ids.shape == probability.shape == (rows,)
    torch.testing.assert_close(token_ids, logits.argmax(-1))
    # Only the order of sums differs.
    want = torch.softmax(logits.float(), -1).max(-1).values if rows else probability
    torch.testing.assert_close(probability, want, rtol=1e-5, atol=1e-7)


def test_saturated_rows():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, -3e38, 3e38]])
    token_ids, probability = ops.greedy_confidence(logits)
    assert token_ids.tolist() == [0, 2]
    assert probability.tolist() == [1.0, 1.0]


def test_masked_tokens():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0]])
    token_ids, probability = ops.greedy_confidence(logits)
    assert token_ids.tolist() == [1]
    assert probability.tolist() == [0.5]
