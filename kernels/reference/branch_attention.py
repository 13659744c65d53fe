# SPDX-License-Identifier: Apache-2.0
"""Eager twin of `branch_attention`."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.paged_kv import PagedKV

#: Added to the score of a key that is not visible. Finite: where a token sees no prefix at all, its
#: part of the result then weighs nothing instead of being NaN.
_HIDDEN = -1e30


def branch_attention(
    # [N, T, Hq, D], T = S * R
    query: torch.Tensor,
    kv: PagedKV,
    # [S, W] int32
    block_table: torch.Tensor,
    # [S] int32 or int64
    prefix_lengths: torch.Tensor,
    # [N, T, Hkv, D]
    tail_key: torch.Tensor,
    # [N, T, Hkv, D]
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

    T holds R tokens of each of S rows, packed. Token r of row s is at position
    prefix_lengths[s] + r and sees, in one softmax, the row's prefix keys at
    0 .. prefix_lengths[s] - 1 and tail keys 0 .. r of its own row and branch.

    window > 0 (tokens): of the prefix, only keys at p < sinks or p >= first, where first is the
    start of the block that holds token prefix_lengths[s] + R - window, and at least `sinks` (a
    multiple of the block size); the tail stays as it is. sliding_window > 0: only keys, prefix and
    tail, within that many tokens, the token's own included. Both hold together. soft_cap > 0: a
    score s becomes soft_cap * tanh(s / soft_cap).

    max_prefix is an upper bound of `prefix_lengths` known on the host. Table entries past a row's
    prefix are not followed, and it does not matter what the cache holds past it.

    Returns [N, T, Hq, D] in the dtype of `query`.
    """
    branches, tokens, query_heads, dim = query.shape
    rows, heads = len(block_table), kv.num_heads
    if not query.numel():
        return torch.empty_like(query)
    refs, group = tokens // rows, query_heads // heads
    # A window that holds everything hides nothing: no masks for it.
    window, sliding_window = (
        size if size < max_prefix + refs else 0 for size in (window, sliding_window)
    )

    # [S*Hkv*N, R*G, D]: the query heads of a KV head are rows of one matrix product
    folded = query.reshape(branches, rows, refs, heads, group, dim).permute(1, 3, 0, 2, 4, 5)
    folded = folded.reshape(rows * heads * branches, refs * group, dim)
    # [S*Hkv*N, R, D]
    key, value = (
        tail.reshape(branches, rows, refs, heads, dim).permute(1, 3, 0, 2, 4).reshape(-1, refs, dim)
        for tail in (tail_key, tail_value)
    )
    # [R, R]: how far tail key t (columns) is behind token r (rows)
    index = torch.arange(refs, device=query.device)
    behind = index[:, None] - index
    hidden = (behind < 0) | (behind >= (sliding_window or refs))
    bias = (hidden.float() * _HIDDEN).repeat_interleave(group, 0)[None]
    result, norm = _attend(folded, key, value, bias, scale, soft_cap)

    # [S, C], [S, P] and [S, P], P <= C * block_size
    blocks, position, visible = _prefix_blocks(
        kv.block_size, block_table, prefix_lengths, refs, max_prefix, sinks, window, sliding_window
    )
    if position.numel():
        key, value = _read_prefix(kv, blocks, visible, query.dtype)
        # [S, R or 1, P]
        visible = visible[:, None]
        if sliding_window:
            oldest = prefix_lengths.long()[:, None] + index - (sliding_window - 1)
            visible = visible & (position[:, None] >= oldest[:, :, None])
        # [S*Hkv, N*R*G or 1, P]
        bias = ((~visible).float() * _HIDDEN).repeat_interleave(heads, 0)
        if sliding_window:
            bias = bias.repeat_interleave(group, 1).repeat(1, branches, 1)
        # [S*Hkv, N*R*G, D]: all branches against the one prefix
        folded = folded.view(rows * heads, branches * refs * group, dim)
        prefix, prefix_norm = _attend(folded, key, value, bias, scale, soft_cap)
        # One softmax over both parts: exp(norm) is what a part's weights were divided by.
        share = torch.sigmoid(prefix_norm.view_as(norm) - norm)[..., None]
        # float32 like `share`; lerp would need float32 copies of both parts.
        result = (prefix.view_as(result) * share).addcmul_(result, 1.0 - share)

    result = result.to(query.dtype).view(rows, heads, branches, refs, group, dim)
    return result.permute(2, 0, 3, 1, 4, 5).reshape(branches, tokens, query_heads, dim)


def _prefix_blocks(
    block_size: int,
    # [S, W] int32
    block_table: torch.Tensor,
    # [S]
    prefix_lengths: torch.Tensor,
    refs: int,
    max_prefix: int,
    sinks: int,
    window: int,
    sliding_window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks [S, C] that may hold a visible prefix key, as few as the arguments on the host
    tell, the positions [S, P] of the first P tokens in them, and which ones are in the prefix."""
    length = prefix_lengths.long()[:, None]
    columns = min(-(-max_prefix // block_size), block_table.shape[1])
    sink_columns = min(sinks // block_size, columns) if window else 0
    recent = columns - sink_columns
    start = torch.full_like(length, sink_columns)
    if window:
        # The first block starts at most block_size - 1 before the window.
        recent = min(recent, -(-max(window - refs + block_size - 1, 0) // block_size))
        start = torch.maximum(start, (length + refs - window) // block_size)
    if sliding_window:
        recent = min(recent, -(-(sliding_window + block_size - 2) // block_size))
        start = torch.maximum(start, (length + 1 - sliding_window) // block_size)
    device = block_table.device
    column = torch.cat(
        [
            torch.arange(sink_columns, device=device).expand(len(length), -1),
            start + torch.arange(recent, device=device),
        ],
        dim=1,
    )
    position = column[:, :, None] * block_size + torch.arange(block_size, device=device)
    # A prefix may end early in a large block, and 16 is the step of the CPU's matrix products.
    end = None if window or sliding_window else -(-max_prefix // 16) * 16
    position = position.flatten(1)[:, :end]
    blocks = block_table.gather(1, column.clamp(max=block_table.shape[1] - 1))
    blocks = blocks.masked_fill(column * block_size >= length, 0)
    return blocks, position, position < length


def _read_prefix(
    kv: PagedKV,
    # [S, C] int32
    blocks: torch.Tensor,
    # [S, P] bool
    visible: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """K and V, each [S*Hkv, P, D], with zeros where not visible, whatever the cache holds there."""
    return [
        found[:, : visible.shape[1]]
        .masked_fill_(~visible[:, :, None, None], 0.0)
        .transpose(1, 2)
        .flatten(0, 1)
        for found in kv.gather(blocks, dtype)
    ]


def _attend(
    # [B, M, D]
    query: torch.Tensor,
    # [B, P, D]
    key: torch.Tensor,
    # [B, P, D]
    value: torch.Tensor,
    # [B or 1, M or 1, P] float32
    bias: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention [B, M, D], and the log [B, M] of what its weights were divided by."""
    if query.device.type == "cpu" and not soft_cap:
        # Several times faster than the lines below: scores stay in the CPU's caches and products
        # are in the inputs' dtype. Not scaled_dot_product_attention, which drops the second result.
        result, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, None], key[:, None], value[:, None], attn_mask=bias[:, None], scale=scale
        )
        return result[:, 0], norm[:, 0]
    scores = torch.bmm(query.float() * scale, key.float().mT)
    if soft_cap:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    scores.add_(bias)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    result = torch.bmm(weights, value.float()).div_(total)
    return result, (highest + total.log())[..., 0]
