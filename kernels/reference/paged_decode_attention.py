# SPDX-License-Identifier: Apache-2.0
"""Eager twin of `paged_decode_attention`."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.paged_kv import PagedKV


def paged_decode_attention(
    # [B, Hq, D]
    query: torch.Tensor,
    kv: PagedKV,
    # [B, W] int32
    block_table: torch.Tensor,
    # [B] int32 or int64, 0 for padding rows
    lengths: torch.Tensor,
    scale: float,
    *,
    max_length: int,
    sinks: int = 0,
    window: int = 0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of one token per row, at position lengths[b] - 1, over the row's paged keys.

    window > 0 (tokens): only keys at p < sinks or p >= first, where first is the start of the block
    that holds token lengths[b] - window, and at least `sinks` (a multiple of the block size).
    sliding_window > 0: only keys at p >= lengths[b] - sliding_window. Both hold together.
    soft_cap > 0: a score s becomes soft_cap * tanh(s / soft_cap).

    max_length is an upper bound of `lengths` known on the host. Table entries past a row's length
    are not followed, and it does not matter what the cache holds past it.

    Returns [B, Hq, D] in the dtype of `query`; a row of length 0 gives zeros.
    """
    rows, query_heads, dim = query.shape
    group = query_heads // kv.num_heads
    # [B, 1]
    length = lengths.long()[:, None]
    oldest = length - sliding_window if sliding_window else torch.zeros_like(length)
    first = torch.zeros_like(length)
    if window:
        first = ((length - window) // kv.block_size * kv.block_size).clamp_(min=sinks)

    recent = min((size for size in (window, sliding_window) if size), default=max_length)
    columns = _visible_columns(
        torch.maximum(first, oldest) // kv.block_size,
        sinks // kv.block_size if window else 0,
        (recent + kv.block_size - 2) // kv.block_size + 1,
        min(-(-max_length // kv.block_size), block_table.shape[1]),
    )
    slots = torch.arange(kv.block_size, device=query.device)
    # [B, P]
    position = (columns[:, :, None] * kv.block_size + slots).flatten(1)
    visible = (position < length) & (position >= oldest)
    if window:
        visible &= (position < sinks) | (position >= first)

    blocks = block_table.gather(1, columns.clamp(max=block_table.shape[1] - 1))
    blocks = blocks.masked_fill(columns * kv.block_size >= length, 0)
    key, value = kv.gather(blocks, torch.float32)
    # [B, Hkv, G, P]
    scores = (query.float() * scale).view(rows, kv.num_heads, group, dim) @ key.permute(0, 2, 3, 1)
    if soft_cap:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    # Finite, so that a row without keys gets weights (of zeros) and not NaN.
    scores = scores.masked_fill_(~visible[:, None, None], torch.finfo(torch.float32).min)
    # All bits or none: on a CPU five times faster than masked_fill with a broadcast mask.
    value.view(torch.int32).bitwise_and_(-visible.int()[:, :, None, None])
    result = scores.softmax(-1) @ value.transpose(1, 2)
    return result.view(rows, query_heads, dim).to(query.dtype)


def _visible_columns(
    # [B, 1] int64, first column of the recent tokens; negative is as good as 0
    start: torch.Tensor,
    sink_columns: int,
    recent_columns: int,
    all_columns: int,
) -> torch.Tensor:
    """Columns [B, C] of the block table that may hold visible keys, each at most once a row: those
    of the sinks and of the recent tokens, or the first `all_columns` if those are fewer."""
    rows, device = len(start), start.device
    if sink_columns + recent_columns >= all_columns:
        return torch.arange(all_columns, device=device).expand(rows, -1)
    sinks = torch.arange(sink_columns, device=device).expand(rows, -1)
    recent = start.clamp(min=0) + torch.arange(recent_columns, device=device)
    return torch.cat([sinks, recent], dim=1)
