# SPDX-License-Identifier: Apache-2.0
"""Attention of one token per row over the paged KV, reading only what the token may see.

    out[b, h] = sum_p softmax_p(cap(scale * query[b, h] . K[b, p])) V[b, p]    over visible p

With `dropped` tokens between the sinks and the window left out, the visible keys of a row are one
interval of the numbers u = 0, 1, ...: token u where u < sinks, token u + dropped elsewhere. The
interval is cut into tiles, and the tiles into as many splits as the grid has. One program reads
one split for the query heads of one KV head (some of them where they are many). Without splits it
writes the result; with splits it leaves a partial result to `reduce_splits`, whose three values
attention_parts.py explains.

Rows are cut by their own length: under a CUDA graph max_length is the longest context there can be,
and pieces of a fixed size would leave a short row to one program. A split without keys, and a
padding row (length 0), read nothing; a padding row gives zeros. Table entries past a row's length
are never followed. The output is new memory; no argument is written.

K and V are converted to the dtype of the query for the two matrix products; sums and softmax are in
float32. The scales of an fp8 cache are applied to scores and sums, so its values are never rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from knapspec_vllm.kernels.attention_parts import (
    LOG2E,
    TILE_BYTES,
    UNLIMITED,
    dim_offsets,
    first_visible,
    load_tile,
    online_softmax,
    product_type,
    reduce_splits,
    soft_capped,
    split_count,
    strides_of,
    tables_of,
    token_offsets,
    visible_bound,
)
from knapspec_vllm.kernels.paged_kv import PagedKV

NUM_WARPS = 4
#: The table entry, two tiles ahead of it: Triton gives two of the stages to the indirection.
NUM_STAGES = 5
#: Programs at a time on an SM; five would fit by shared memory and registers. Of eleven sets of
#: tile, warps, stages and places tried on an H200, the one with the most even figures: 77% of the
#: copy bandwidth at 8 x 8k tokens, 96% at 32 x 8k, 97% at 64 x 4k (8B's heads, bf16). Tiles twice
#: as large with three places: 75, 94 and 92%.
PER_SM = 4


@triton.jit(do_not_specialize=["sinks", "window", "sliding_window", "table_stride"])
def _paged_decode_attention_kernel(
    # [B, Hq, D], contiguous; not written if IS_SPLIT
    out_ptr,
    # [B, Hq, splits, D] float32, contiguous; only written if IS_SPLIT, as the next two
    partial_ptr,
    # [B, Hq, splits] float32, contiguous
    maximum_ptr,
    # [B, Hq, splits] float32, contiguous
    total_ptr,
    # [B, Hq, D], adjacent in D
    query_ptr,
    # [elements]
    cache_ptr,
    # [B, W] int32, adjacent in W
    table_ptr,
    # [B] int32 or int64, contiguous
    lengths_ptr,
    # [block_size] int64, [Hkv] and [D] int32
    key_token_ptr,
    key_head_ptr,
    key_dim_ptr,
    # [block_size] int64, [Hkv] and [D] int32
    value_token_ptr,
    value_head_ptr,
    value_dim_ptr,
    score_scale,
    value_scale,
    soft_cap,
    sinks,
    window,
    sliding_window,
    query_row_stride,
    query_head_stride,
    table_stride,
    block_stride,
    key_start,
    key_token_stride,
    key_head_stride,
    value_start,
    value_token_stride,
    value_head_stride,
    KEY_DIM_STRIDE: tl.constexpr,
    VALUE_DIM_STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRODUCT: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PARTS: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = tl.program_id(0) // PARTS
    in_group = tl.program_id(0) % PARTS * BLOCK_G + tl.arange(0, BLOCK_G)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    query_heads = tl.num_programs(0) // PARTS * GROUP
    head = kv_head * GROUP + in_group
    dims = tl.arange(0, BLOCK_D)
    head_mask = in_group < GROUP
    tile_mask = head_mask[:, None] & (dims < DIM)[None, :]

    length = tl.load(lengths_ptr + row).to(tl.int32)
    first = first_visible(length, window, sinks, BLOCK_SIZE)
    dropped = first - sinks
    oldest = tl.maximum(length - sliding_window, 0)
    # Numbers u of the oldest visible key and of the end.
    begin = tl.where(oldest < first, tl.minimum(oldest, sinks), oldest - dropped)
    end = length - dropped
    per_split = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    start = begin + split * per_split
    stop = tl.minimum(start + per_split, end)

    query = tl.load(
        query_ptr + row * query_row_stride + head[:, None] * query_head_stride + dims[None, :],
        mask=tile_mask,
        other=0.0,
    ).to(PRODUCT)
    key_dims = dim_offsets(key_dim_ptr, dims, DIM, KEY_DIM_STRIDE, STRIDED)
    value_dims = dim_offsets(value_dim_ptr, dims, DIM, VALUE_DIM_STRIDE, STRIDED)

    maximum = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    accumulated = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for tile in range(start, stop, BLOCK_N):
        number = tile + tl.arange(0, BLOCK_N)
        visible = number < stop
        position = number + tl.where(number < sinks, 0, dropped)
        slot = position % BLOCK_SIZE
        block = tl.load(
            table_ptr + row * table_stride + position // BLOCK_SIZE, mask=visible, other=0
        )
        base = block.to(tl.int64) * block_stride

        tokens = base + token_offsets(
            key_token_ptr,
            key_head_ptr,
            key_start,
            key_token_stride,
            key_head_stride,
            kv_head,
            slot,
            visible,
            STRIDED,
        )
        key = load_tile(cache_ptr, tokens, key_dims, visible, dims, DIM, BLOCK_D)
        # "ieee" matters for float32 only, which would otherwise be rounded to TF32.
        scores = tl.dot(query, tl.trans(key.to(PRODUCT)), input_precision="ieee") * score_scale
        if HAS_CAP:
            scores = soft_capped(scores, soft_cap)
        scores = tl.where(visible[None, :], scores, -float("inf"))
        weights, rescale, maximum, total = online_softmax(scores, maximum, total)

        tokens = base + token_offsets(
            value_token_ptr,
            value_head_ptr,
            value_start,
            value_token_stride,
            value_head_stride,
            kv_head,
            slot,
            visible,
            STRIDED,
        )
        value = load_tile(cache_ptr, tokens, value_dims, visible, dims, DIM, BLOCK_D)
        accumulated = accumulated * rescale[:, None]
        accumulated = tl.dot(
            weights.to(PRODUCT), value.to(PRODUCT), accumulated, input_precision="ieee"
        )

    accumulated = accumulated * value_scale
    result = row * query_heads + head
    if IS_SPLIT:
        result = result * splits + split
        tl.store(maximum_ptr + result, maximum, mask=head_mask)
        tl.store(total_ptr + result, total, mask=head_mask)
        used = tile_mask & (total != 0.0)[:, None]
        tl.store(partial_ptr + result[:, None] * DIM + dims[None, :], accumulated, mask=used)
    else:
        accumulated = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
        out = accumulated.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + result[:, None] * DIM + dims[None, :], out, mask=tile_mask)


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
    """Attention of one token per row; see the twin in reference/ for what each argument means.

    max_length is only used to choose the number of splits. Returns [B, Hq, D] in the dtype of
    `query`.
    """
    rows, query_heads, dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    query = query if query.stride(2) == 1 else query.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    group = query_heads // kv.num_heads
    block_d = max(16, triton.next_power_of_2(dim))
    # tl.dot wants 16 rows or more. 8192 sums are 64 registers a thread; heads beyond that go to
    # another program, which finds the tiles in L2.
    block_g = max(16, min(8192 // block_d, triton.next_power_of_2(group)))
    # 64 tokens at D = 64, 32 at 128, 16 at 256 (16 bits).
    block_n = max(16, min(128, TILE_BYTES // (block_d * query.itemsize)))
    # KV heads along the first axis: they share the blocks of a row, which lie together in memory.
    programs = kv.num_heads * triton.cdiv(group, block_g)

    tokens = visible_bound(max_length, kv.block_size, sinks, window, sliding_window)
    # A partial result of a GQA group of 4 heads is as large as 4 tokens of K and V: 128 tokens keep
    # what the second stage moves below a few percent.
    splits = split_count(rows * programs, tokens, block_n, 128, PER_SM, query.device)
    partial = maximum = total = out
    if splits > 1:
        partial = torch.empty(
            (rows, query_heads, splits, dim), dtype=torch.float32, device=query.device
        )
        # Two allocations: halves of one would be aligned, or not, as the batch happens to be, and
        # Triton compiles for either.
        maximum = partial.new_empty((rows, query_heads, splits))
        total = torch.empty_like(maximum)
    strided, key_strides, value_strides = strides_of(kv)
    _paged_decode_attention_kernel[(programs, splits, rows)](
        out,
        partial,
        maximum,
        total,
        query,
        kv.cache,
        block_table,
        lengths.contiguous(),
        *tables_of(kv.key),
        *tables_of(kv.value),
        scale * kv.key_scale * LOG2E.value,
        kv.value_scale,
        soft_cap * LOG2E.value,
        sinks,
        window or UNLIMITED,
        sliding_window or UNLIMITED,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        kv.block_stride,
        *key_strides[:3],
        *value_strides[:3],
        KEY_DIM_STRIDE=key_strides[3],
        VALUE_DIM_STRIDE=value_strides[3],
        STRIDED=strided,
        HAS_CAP=soft_cap > 0,
        IS_SPLIT=splits > 1,
        PRODUCT=product_type(query.dtype),
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=kv.block_size,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if splits > 1:
        reduce_splits(partial, maximum, total, out)
    return out
