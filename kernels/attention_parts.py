# SPDX-License-Identifier: Apache-2.0
"""Parts that the two attention kernels share.

Scores are kept in units of log2 inside the kernels (score * LOG2E), because the hardware has exp2
and not exp. A split of the keys leaves three values behind for each query head:
    maximum = the highest score it saw; -inf where it saw no key
    total   = sum of exp2(score - maximum); 0 where it saw no key
    partial = sum of exp2(score - maximum) * value; not written where it saw no key
Merging the splits of one row is
    out = sum_s partial_s * exp2(maximum_s - m) / sum_s total_s * exp2(maximum_s - m)
with m the highest maximum, and zeros where no split saw a key.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from knapspec_vllm.kernels.paged_kv import Addresses, PagedKV

LOG2E = tl.constexpr(math.log2(math.e))
#: In place of a window size: no window. A length minus this is negative and cannot overflow.
UNLIMITED = 2**31 - 1
#: Bytes of one K or V tile. With two of each in flight a program takes 37 KiB of shared memory:
#: five run at a time on an SM of an H100 or H200.
TILE_BYTES = 8192


@triton.jit
def soft_capped(scores, cap):
    """cap * tanh(scores / cap); scores and cap in the same unit (both times LOG2E, or neither)."""
    # In this form an overflowing exponential gives 1, and a vanishing one gives -1, without NaN.
    return cap - 2.0 * cap / (1.0 + tl.exp2(scores * (2.0 * LOG2E / cap)))


@triton.jit
def first_visible(length, window, sinks, BLOCK_SIZE: tl.constexpr):
    """First token of the last `window` tokens, rounded down to a block, and not before `sinks`."""
    # Clamped before the division: Triton divides towards zero and Python towards minus infinity.
    return tl.maximum(tl.maximum(length - window, 0) // BLOCK_SIZE * BLOCK_SIZE, sinks)


@triton.jit
def online_softmax(
    # [M, N] float32 in units of log2, -inf where the key is not visible
    scores,
    # [M] float32, the highest score so far, -inf where none was visible
    maximum,
    # [M] float32, sum of exp2(score - maximum) so far
    total,
):
    """Takes one tile of scores in. Returns (weights [M, N], rescale [M], maximum, total); what has
    been summed with the old maximum must be multiplied by rescale."""
    higher = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no key yet: -inf minus -inf would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(maximum - base)
    return weights, rescale, higher, total * rescale + tl.sum(weights, 1)


@triton.jit
def token_offsets(
    # [block_size] int64
    token_ptr,
    # [Hkv] int32
    head_ptr,
    start,
    token_stride,
    head_stride,
    kv_head,
    # [N], token within its block
    slot,
    # [N] bool
    visible,
    STRIDED: tl.constexpr,
):
    """Offsets [N] of a head's tokens within their block, from strides or from tables."""
    if STRIDED:
        offsets = start + slot * token_stride + kv_head * head_stride
    else:
        offsets = tl.load(token_ptr + slot, mask=visible, other=0) + tl.load(head_ptr + kv_head)
    return offsets


@triton.jit
def dim_offsets(
    # [D] int32
    dim_ptr,
    # [BLOCK_D]
    dims,
    DIM: tl.constexpr,
    DIM_STRIDE: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """Offsets [BLOCK_D] of a head's elements. A constexpr stride lets the compiler see that
    neighbours are adjacent, and load 16 bytes a thread."""
    if STRIDED:
        offsets = dims * DIM_STRIDE
    else:
        offsets = tl.load(dim_ptr + dims, mask=dims < DIM, other=0)
    return offsets


@triton.jit
def load_tile(
    cache_ptr,
    # [N] int64, where each token starts
    tokens,
    # [BLOCK_D]
    offsets,
    # [N] bool
    visible,
    # [BLOCK_D]
    dims,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """K or V of N tokens, [N, BLOCK_D]; zero where not visible, whatever the cache holds there."""
    if DIM == BLOCK_D:
        mask = visible[:, None]
    else:
        mask = visible[:, None] & (dims < DIM)[None, :]
    return tl.load(cache_ptr + (tokens[:, None] + offsets[None, :]), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["splits"])
def _reduce_splits_kernel(
    # [rows, D], contiguous
    out_ptr,
    # [rows, splits, D] float32, contiguous
    partial_ptr,
    # [rows, splits] float32, contiguous
    maximum_ptr,
    # [rows, splits] float32, contiguous
    total_ptr,
    splits,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    maximum = -float("inf")
    total = 0.0
    accumulated = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        index = row * splits + split
        found = tl.load(maximum_ptr + index, mask=split < splits, other=-float("inf"))
        sums = tl.load(total_ptr + index, mask=split < splits, other=0.0)
        # A split without keys wrote no partial sums. NaN is not 0 and so not hidden.
        used = sums != 0.0
        part = tl.load(
            partial_ptr + index[:, None] * DIM + dims[None, :],
            mask=used[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        higher = tl.maximum(maximum, tl.max(found, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(found - base)
        rescale = tl.exp2(maximum - base)
        total = total * rescale + tl.sum(weights * sums, 0)
        accumulated = accumulated * rescale + tl.sum(weights[:, None] * part, 0)
        maximum = higher
    result = accumulated / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * DIM + dims, result.to(out_ptr.dtype.element_ty), mask=dims < DIM)


def reduce_splits(
    # [..., splits, D] float32, contiguous; read only where total is not 0
    partial: torch.Tensor,
    # [..., splits] float32, contiguous; units of log2, -inf where the split saw no key
    maximum: torch.Tensor,
    # [..., splits] float32, contiguous; 0 where the split saw no key
    total: torch.Tensor,
    # [..., D] any float dtype, contiguous; written
    out: torch.Tensor,
) -> None:
    """Second stage of split-KV attention: merges the splits of each row into `out`."""
    splits, dim = partial.shape[-2:]
    rows = out.numel() // dim
    if not rows:
        return
    # 16 splits x 256 dims in float32 are 32 registers a thread at 4 warps: all 128 splits at once
    # would not fit, so the kernel loops. One size for any number of splits, so that a batch of
    # another shape does not compile another binary while a request waits.
    _reduce_splits_kernel[(rows,)](
        out,
        partial,
        maximum,
        total,
        splits,
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_S=16,
        num_warps=4,
    )


def visible_bound(
    longest: int, block_size: int, sinks: int, window: int, sliding_window: int
) -> int:
    """Most keys that a token can see, from host data only; longest: the longest context."""
    return min(
        longest, sinks + window + block_size if window else longest, sliding_window or longest
    )


def split_count(
    programs: int, tokens: int, tile: int, piece: int, per_sm: int, device: torch.device
) -> int:
    """Into how many splits each row's keys go; from host data only.

    programs: of the grid without splits; tokens: upper bound of the keys a program would read, in
    tiles of `tile`; piece: fewest keys that are worth a partial result; per_sm: programs that one
    multiprocessor runs at a time.
    """
    # 128 splits is what the second stage merges quickly.
    most = max(1, min(-(-tokens // piece), 128))
    # One row far longer than the rest must not be left to one program for long: reading 16k tokens
    # takes by estimate 0.2 ms (D = 128, bf16, 32 KiB in flight).
    least = max(1, min(most, -(-tokens // (128 * piece))))
    tiles = -(-tokens // tile)
    return _evenly(max(programs, 1), tiles, least, most, per_sm * _multiprocessors(device))


@functools.lru_cache(4096)
def _evenly(programs: int, tiles: int, least: int, most: int, places: int) -> int:
    """The fewest splits whose waves of programs take nearly as few tiles' time as can be.

    Neither a last wave nor a last tile should be left half empty: on an H200 and with 396 places, 8
    rows x 8 KV heads of 8k tokens read 2.7 TB/s in eight splits (two waves, of 512 programs) and
    3.2 in six, 32 rows 3.3 in two splits and 4.0 in three.
    """
    times = {
        splits: -(-programs * splits // places) * -(-tiles // splits)
        for splits in range(least, most + 1)
    }
    enough = _NEARLY * min(times.values())
    return next(splits for splits, time in times.items() if time <= enough)


#: Of the shortest time, what fewer splits may take.
_NEARLY = 1.05


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """8 under the interpreter: enough for tests to meet grids with and without splits."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def product_type(dtype: torch.dtype) -> tl.dtype:
    """The type that query, K, V and weights have in matrix products, as Triton names it."""
    # The interpreter's tl.dot multiplies the bit patterns of bfloat16 as integers (3.4 to 3.9).
    if dtype is torch.float32 or (dtype is torch.bfloat16 and triton.knobs.runtime.interpret):
        return tl.float32
    return tl.bfloat16 if dtype is torch.bfloat16 else tl.float16


def strides_of(kv: PagedKV) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
    """Whether both K and V have strides, and (start, token, head, dim) of each; zeros if not."""
    if kv.key.strides is None or kv.value.strides is None:
        return False, (0, 0, 0, 0), (0, 0, 0, 0)
    return True, kv.key.strides, kv.value.strides


def tables_of(addresses: Addresses) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three offset tables; on the strided path their pointers are passed and never followed."""
    return addresses.token, addresses.head, addresses.dim
