# SPDX-License-Identifier: Apache-2.0
"""Argument checks and dispatch of `ops`; what the ops compute is in `tests/kernels/`."""

import pytest
import torch

from knapspec_vllm import ops


def attention_arguments(**changes):
    cache = torch.zeros(2, 6, 4, 2, 8)
    arguments = {
        "query": torch.zeros(3, 6, 4, 8),
        "kv": ops.PagedKV.of_views(cache[0], cache[1]),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "prefix_lengths": torch.tensor([9, 12]),
        "tail_key": torch.zeros(3, 6, 2, 8),
        "tail_value": torch.zeros(3, 6, 2, 8),
        "scale": 1.0,
        "max_prefix": 12,
    }
    return {**arguments, **changes}


def decode_arguments(**changes):
    arguments = attention_arguments()
    for name in ("prefix_lengths", "tail_key", "tail_value", "max_prefix"):
        del arguments[name]
    extra = {"query": torch.zeros(2, 4, 8), "lengths": torch.tensor([3, 9]), "max_length": 9}
    return {**arguments, **extra, **changes}


def test_accepts_fitting_shapes():
    assert ops.branch_attention(**attention_arguments()).shape == (3, 6, 4, 8)
    assert ops.paged_decode_attention(**decode_arguments()).shape == (2, 4, 8)


@pytest.mark.parametrize(
    "name, value",
    [
        ("prefix_lengths", torch.zeros(3, dtype=torch.int64)),
        ("tail_key", torch.zeros(1, 6, 2, 8)),
        ("tail_value", torch.zeros(3, 6, 1, 8)),
        ("query", torch.zeros(3, 5, 4, 8)),
    ],
)
def test_misfit_names_the_argument(name, value):
    wanted = "tail_key" if name == "query" else name
    with pytest.raises(ValueError, match=wanted):
        ops.branch_attention(**attention_arguments(**{name: value}))


def test_rows_must_divide_the_tokens():
    tables = torch.zeros(4, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="6 tokens do not divide into the 4 rows"):
        ops.branch_attention(
            **attention_arguments(block_table=tables, prefix_lengths=torch.zeros(4))
        )


def test_heads_must_divide():
    with pytest.raises(ValueError, match="3 query heads"):
        ops.paged_decode_attention(**decode_arguments(query=torch.zeros(2, 3, 8)))


def test_head_size_must_be_the_cache_s():
    with pytest.raises(ValueError, match="head size 7, the cache 8"):
        ops.paged_decode_attention(**decode_arguments(query=torch.zeros(2, 4, 7)))


def test_sinks_are_whole_blocks():
    with pytest.raises(ValueError, match="multiple of the block size 4"):
        ops.paged_decode_attention(**decode_arguments(sinks=3, window=4))


def test_every_call_is_counted(monkeypatch):
    monkeypatch.setenv("KNAPSPEC_KERNELS", "eager")
    ops.launches.clear()
    ops.greedy_confidence(torch.zeros(1, 3))
    assert ops.launches == {("greedy_confidence", "eager"): 1}
    assert not ops.uses_triton(torch.zeros(1))


def test_logits_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"\[B, V\]"):
        ops.greedy_confidence(torch.zeros(3))
