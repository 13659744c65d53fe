# SPDX-License-Identifier: Apache-2.0
"""Attention of N branches over their rows' shared paged prefix and a private causal tail each.

    out[n, s, r] = sum_k softmax_k(cap(scale * query[n, s, r] . K[k])) V[k]
        over the visible prefix keys of row s and tail keys 0 .. r of row s in branch n

The query rows of one (row, KV head), numbered (n * R + r) * G + g over N branches, R tokens and the
G query heads of the KV head, are cut into tiles of up to 128, which may span branches. One program
takes one tile over one split of the prefix, so that each prefix key it loads serves 128 query rows.
The last split's program goes on over the tail keys of the tile's own branches, numbered n * R + r:
a query row sees those from the start of its branch to its own token, a block-diagonal mask. Without
splits the program writes the result; with splits it leaves a partial result to `reduce_splits` (see
attention_parts.py for its three values).

The visible prefix is one interval of the numbers u: token u where u < sinks, token u + dropped
elsewhere, `dropped` tokens between the sinks and the window being left out. It is cut into splits
by its own length, not by the bound max_prefix. What is not visible is not loaded, and table entries
past a row's prefix are not followed. A row without a prefix has its tail alone. Query rows beyond
N * R * G, which fill the last tile, are computed as zeros and not stored. The output is new memory;
no argument is written.

K and V are converted to the dtype of the query for the two matrix products; sums and softmax are in
float32. The scales of an fp8 cache are applied to scores and sums, so its values are never rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from knapspec_vllm.kernels.attention_parts import (
    LOG2E,
    UNLIMITED,
    dim_offsets,
    first_visible,
    load_tile,
    online_softmax,
    product_type,
    reduce_splits,
    shared_bytes,
    soft_capped,
    split_count,
    strides_of,
    tables_of,
    visible_bound,
)
from knapspec_vllm.kernels.paged_kv import PagedKV

PARTIAL_BYTES = 32 << 20  # at most: they are read back from the L2 cache, 50 MB on an H100


@triton.jit
def _attend(
    # [M, D] and [N, D], any dtypes
    query,
    key,
    value,
    # [M, N] or [1, N] bool, or None where every key is visible
    seen,
    score_scale,
    soft_cap,
    # [M], [M] and [M, D] float32: what `online_softmax` keeps, and the weighted sum
    maximum,
    total,
    accumulated,
    PRODUCT: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    # "ieee" matters for float32 only, which would otherwise be rounded to TF32.
    scores = tl.dot(query, tl.trans(key.to(PRODUCT)), input_precision="ieee") * score_scale
    if HAS_CAP:
        scores = soft_capped(scores, soft_cap)
    if seen is not None:
        scores = tl.where(seen, scores, -float("inf"))
    weights, rescale, maximum, total = online_softmax(scores, maximum, total)
    accumulated = accumulated * rescale[:, None]
    weights, value = weights.to(PRODUCT), value.to(PRODUCT)
    accumulated = tl.dot(weights, value, accumulated, input_precision="ieee")
    return maximum, total, accumulated


@triton.jit(
    do_not_specialize=["branches", "refs", "sinks", "window", "sliding_window", "table_stride"]
)
def _branch_attention_kernel(
    # [N * T, Hq * D], contiguous; not written if IS_SPLIT
    out_ptr,
    # [N * T, Hq, splits, D] float32, contiguous; only written if IS_SPLIT, as the next two
    partial_ptr,
    # [N * T, Hq, splits] float32, contiguous
    maximum_ptr,
    total_ptr,
    # [N * T, Hq * D], adjacent in the second axis
    query_ptr,
    # [N * T, Hkv * D], adjacent in the second axis
    tail_key_ptr,
    tail_value_ptr,
    # [elements]
    cache_ptr,
    # [S, W] int32, adjacent in W
    table_ptr,
    # [S] int32 or int64, contiguous
    prefix_ptr,
    # [block_size] int64, [Hkv] and [D] int32, of K and of V
    key_token_ptr,
    key_head_ptr,
    key_dim_ptr,
    value_token_ptr,
    value_head_ptr,
    value_dim_ptr,
    prefix_scale, tail_scale, value_scale, soft_cap,
    branches, refs, sinks, window, sliding_window,
    query_stride, tail_key_stride, tail_value_stride, table_stride, block_stride,
    key_start, key_token_stride, key_head_stride,
    value_start, value_token_stride, value_head_stride,
    KEY_DIM_STRIDE: tl.constexpr, VALUE_DIM_STRIDE: tl.constexpr, STRIDED: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SLIDING: tl.constexpr, IS_SPLIT: tl.constexpr,
    PRODUCT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % HEADS
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    # T, in int64 as every product with it
    packed = (tl.num_programs(1) // HEADS).to(tl.int64) * refs
    dims = tl.arange(0, BLOCK_D)
    folded = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Number n * R + r of the token, and of the first one in its branch.
    token = folded // GROUP
    own = token // refs * refs
    place = token // refs * packed + row * refs + token % refs
    head = kv_head * GROUP + folded % GROUP
    stored = token < branches * refs
    tile_mask = stored[:, None] & (dims < DIM)[None, :]
    at = place * query_stride + head * DIM
    query = tl.load(query_ptr + at[:, None] + dims[None, :], mask=tile_mask, other=0.0).to(PRODUCT)

    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    prefix = tl.load(prefix_ptr + row).to(tl.int32)
    first = first_visible(prefix + refs, window, sinks, BLOCK_SIZE)
    # A window shorter than the tail may begin after the prefix.
    dropped = tl.minimum(first, tl.maximum(prefix, sinks)) - sinks
    # Oldest key that the first of the R tokens sees; later tokens see no older ones.
    oldest = tl.maximum(prefix + 1 - sliding_window, 0)
    begin = tl.where(oldest < sinks + dropped, tl.minimum(oldest, sinks), oldest - dropped)
    end = prefix - dropped
    per_split = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    start = begin + split * per_split
    stop = tl.minimum(start + per_split, end)
    # Whole tiles need no mask, which saves one of about ten instructions a score.
    whole = start
    if not HAS_SLIDING:
        whole += tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N

    key_dims = dim_offsets(key_dim_ptr, dims, DIM, KEY_DIM_STRIDE, STRIDED)
    value_dims = dim_offsets(value_dim_ptr, dims, DIM, VALUE_DIM_STRIDE, STRIDED)
    if STRIDED:
        key_base = key_start + kv_head * key_head_stride
        value_base = value_start + kv_head * value_head_stride
    else:
        key_base, value_base = tl.load(key_head_ptr + kv_head), tl.load(value_head_ptr + kv_head)
    for RAGGED in tl.static_range(2):
        for tile in range(whole if RAGGED else start, stop if RAGGED else whole, BLOCK_N):
            number = tile + tl.arange(0, BLOCK_N)
            visible = number < stop
            position = number + tl.where(number < sinks, 0, dropped)
            slot = position % BLOCK_SIZE
            block_ptr = table_ptr + row * table_stride + position // BLOCK_SIZE
            base = tl.load(block_ptr, mask=visible, other=0).to(tl.int64) * block_stride
            if STRIDED:
                key_at, value_at = slot * key_token_stride, slot * value_token_stride
            else:
                key_at = tl.load(key_token_ptr + slot)
                value_at = tl.load(value_token_ptr + slot)
            key_at, value_at = base + key_base + key_at, base + value_base + value_at
            key = load_tile(cache_ptr, key_at, key_dims, visible, dims, DIM, BLOCK_D)
            value = load_tile(cache_ptr, value_at, value_dims, visible, dims, DIM, BLOCK_D)
            seen = None
            if RAGGED:
                seen = visible[None, :]
                if HAS_SLIDING:
                    since = token - own - sliding_window
                    seen = seen & ((position - prefix)[None, :] > since[:, None])
            maximum, total, accumulated = _attend(
                query, key, value, seen, prefix_scale, soft_cap,
                maximum, total, accumulated, PRODUCT, HAS_CAP,
            )  # fmt: skip
    accumulated = accumulated * value_scale

    oldest = tl.maximum(own, token + 1 - sliding_window)
    start = tl.program_id(0) * BLOCK_M // GROUP // refs * refs
    stop = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // GROUP + 1, branches * refs)
    for tile in range(start, stop if split == splits - 1 else start, BLOCK_N):
        number = tile + tl.arange(0, BLOCK_N)
        tokens = number // refs * packed + row * refs + number % refs
        key_at = tokens * tail_key_stride + kv_head * DIM
        value_at = tokens * tail_value_stride + kv_head * DIM
        key = load_tile(tail_key_ptr, key_at, dims, number < stop, dims, DIM, BLOCK_D)
        value = load_tile(tail_value_ptr, value_at, dims, number < stop, dims, DIM, BLOCK_D)
        seen = (number[None, :] >= oldest[:, None]) & (number[None, :] <= token[:, None])
        maximum, total, accumulated = _attend(
            query, key, value, seen, tail_scale, soft_cap,
            maximum, total, accumulated, PRODUCT, HAS_CAP,
        )  # fmt: skip

    result = place * (HEADS * GROUP) + head
    if IS_SPLIT:
        result = result * splits + split
        tl.store(maximum_ptr + result, maximum, mask=stored)
        tl.store(total_ptr + result, total, mask=stored)
        used = tile_mask & (maximum != -float("inf"))[:, None]
        tl.store(partial_ptr + result[:, None] * DIM + dims[None, :], accumulated, mask=used)
    else:
        accumulated = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
        out = accumulated.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + result[:, None] * DIM + dims[None, :], out, mask=tile_mask)


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
    """Attention of branches; see the twin in reference/ for what each argument means.

    max_prefix only chooses the number of splits. Returns [N, T, Hq, D], the dtype of `query`.
    """
    branches, tokens, query_heads, dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    rows, heads = len(block_table), kv.num_heads
    refs, group = tokens // rows, query_heads // heads
    # Branches and tokens as one axis, heads and D as another: views of what a QKV projection gives.
    flat = [tensor.reshape(branches * tokens, -1) for tensor in (query, tail_key, tail_value)]
    flat = [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in flat]
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()

    # Largest tiles whose sums and scores stay in registers on sm_90. At D = 64 two programs of 4
    # warps fit in an SM: one's softmax overlaps the other's products.
    half = query.itemsize == 2
    block_d = max(16, triton.next_power_of_2(dim))
    block_m = triton.next_power_of_2(branches * refs * group)
    block_m = max(16, min(block_m, 128 if half else 32))
    block_n = max(16, min(64, 8192 // block_d)) if half else 16
    if half and shared_bytes(query.device) < 160 * 1024:  # 99 KiB on an RTX 4090, L4 or A10
        block_n = max(16, block_n // 2)
        block_m = min(block_m, 64) if block_d > 128 else block_m
    num_warps = 8 if block_m * block_d >= 128 * 128 or not half else 4
    tiles = triton.cdiv(branches * refs * group, block_m)

    longest = visible_bound(max_prefix, kv.block_size, sinks, window, sliding_window)
    # A tile's partial results are as large as hundreds of keys.
    per_sm = 1 if num_warps == 8 else 2
    piece = max(1024, -(-longest * 4 * out.numel() // PARTIAL_BYTES))
    splits = split_count(tiles * rows * heads, longest, block_n, piece, per_sm, query.device)
    partial = maximum = total = out
    if splits > 1:
        shape = (branches * tokens, query_heads, splits)
        partial = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
        maximum, total = partial.new_empty(shape), partial.new_empty(shape)
    strided, key_strides, value_strides = strides_of(kv)
    # Tiles along the first axis: those that run at a time read the same keys.
    _branch_attention_kernel[(tiles, rows * heads, splits)](
        out, partial, maximum, total, *flat, kv.cache, block_table, prefix_lengths.contiguous(),
        *tables_of(kv.key), *tables_of(kv.value),
        scale * kv.key_scale * LOG2E.value, scale * LOG2E.value, kv.value_scale,
        soft_cap * LOG2E.value,
        branches, refs, sinks if window else 0, window or UNLIMITED, sliding_window or UNLIMITED,
        *(tensor.stride(0) for tensor in flat), block_table.stride(0), kv.block_stride,
        *key_strides[:3], *value_strides[:3],
        KEY_DIM_STRIDE=key_strides[3], VALUE_DIM_STRIDE=value_strides[3], STRIDED=strided,
        HAS_CAP=soft_cap > 0, HAS_SLIDING=sliding_window > 0, IS_SPLIT=splits > 1,
        PRODUCT=product_type(query.dtype), HEADS=heads, GROUP=group, DIM=dim,
        BLOCK_SIZE=kv.block_size, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        num_warps=num_warps, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        reduce_splits(partial, maximum, total, out)
    return out
