# SPDX-License-Identifier: Apache-2.0
"""Argument checks of `ops`; what the ops compute is in `tests/kernels/`."""

import pytest
import torch

from knapspec_vllm import ops


def attention_arguments(**changes):
    arguments = {
        "query": torch.zeros(2, 3, 4, 8),
        "prefix_key": torch.zeros(5, 2, 8),
        "prefix_value": torch.zeros(5, 2, 8),
        "tail_key": torch.zeros(2, 3, 2, 8),
        "tail_value": torch.zeros(2, 3, 2, 8),
        "scale": 1.0,
        "prefix_mask": torch.ones(3, 5, dtype=torch.bool),
    }
    return {**arguments, **changes}


def test_accepts_fitting_shapes():
    assert ops.branch_attention(**attention_arguments()).shape == (2, 3, 4, 8)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("prefix_key", torch.zeros(5, 2, 7)),
        ("prefix_value", torch.zeros(4, 2, 8)),
        ("tail_key", torch.zeros(1, 3, 2, 8)),
        ("tail_value", torch.zeros(2, 3, 1, 8)),
        ("prefix_mask", torch.ones(5, 3, dtype=torch.bool)),
        ("prefix_mask", torch.ones(3, 5)),
    ],
)
def test_misfit_names_the_argument(name, tensor):
    with pytest.raises(ValueError, match=name):
        ops.branch_attention(**attention_arguments(**{name: tensor}))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="3 query heads"):
        ops.branch_attention(**attention_arguments(query=torch.zeros(2, 3, 3, 8)))


def test_logits_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"\[B, V\]"):
        ops.greedy_confidence(torch.zeros(3))
