# SPDX-License-Identifier: Apache-2.0
"""Attention of drafts and of the solver over the paged KV cache."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.paged_kv import PagedKV
from knapspec_vllm.ops.dispatch import check, run


def paged_decode_attention(
    query: torch.Tensor,
    kv: PagedKV,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    max_length: int,
    sinks: int = 0,
    window: int = 0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of one token per row over the paged KV.

    query [B, Hq, D], the token at position lengths[b] - 1; block_table [B, W] int32; lengths [B]
    int32 or int64, 0 for padding rows (they give zeros); max_length: host-side upper bound of
    lengths. window > 0 reads only the first `sinks` tokens and the blocks of the last `window`
    ones; sliding_window > 0 is the model's own; soft_cap > 0 caps scores at cap * tanh(s / cap).

    Returns [B, Hq, D] in the dtype of `query`; softmax and sums in float32. Raises ValueError for
    shapes that do not fit together.
    """
    rows, query_heads, dim = query.shape
    _check_kv(kv, query_heads, dim)
    _check_window(kv, sinks, window)
    check("lengths", lengths, (rows,))
    check("block_table", block_table, (rows, block_table.shape[-1]))
    return run(
        "paged_decode_attention",
        query,
        query,
        kv,
        block_table,
        lengths,
        scale,
        max_length=max_length,
        sinks=sinks,
        window=window,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


def branch_attention(
    query: torch.Tensor,
    kv: PagedKV,
    block_table: torch.Tensor,
    prefix_lengths: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    scale: float,
    *,
    max_prefix: int,
    sinks: int = 0,
    window: int = 0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of N branches over their rows' shared paged prefix and a private causal tail each.

    query [N, T, Hq, D], T = S * R: R tokens of each of S rows, packed; block_table [S, W] int32;
    prefix_lengths [S] int32 or int64; tail_key, tail_value [N, T, Hkv, D]; max_prefix: host-side
    upper bound of prefix_lengths. Token r of a row is at position prefix_length + r and sees the
    row's prefix and tail tokens 0..r of its own row and branch. window, sinks, sliding_window and
    soft_cap as in paged_decode_attention; the window is that of the row's last token.

    Returns [N, T, Hq, D] in the dtype of `query`; softmax and sums in float32. Raises ValueError
    for shapes that do not fit together.
    """
    branches, tokens, query_heads, dim = query.shape
    _check_kv(kv, query_heads, dim)
    _check_window(kv, sinks, window)
    check("tail_key", tail_key, (branches, tokens, kv.num_heads, dim))
    check("tail_value", tail_value, (branches, tokens, kv.num_heads, dim))
    rows = block_table.shape[0]
    check("prefix_lengths", prefix_lengths, (rows,))
    if not rows or tokens % rows:
        raise ValueError(f"{tokens} tokens do not divide into the {rows} rows of block_table")
    return run(
        "branch_attention",
        query,
        query,
        kv,
        block_table,
        prefix_lengths,
        tail_key,
        tail_value,
        scale,
        max_prefix=max_prefix,
        sinks=sinks,
        window=window,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


def _check_kv(kv: PagedKV, query_heads: int, dim: int) -> None:
    if kv.head_dim != dim:
        raise ValueError(f"the query has head size {dim}, the cache {kv.head_dim}")
    if query_heads % kv.num_heads:
        raise ValueError(f"{query_heads} query heads do not divide into {kv.num_heads} KV heads")


def _check_window(kv: PagedKV, sinks: int, window: int) -> None:
    if window < 0 or sinks < 0 or sinks % kv.block_size:
        raise ValueError(
            f"sinks must be a multiple of the block size {kv.block_size} and window not negative, "
            f"got {sinks} and {window}"
        )
