# SPDX-License-Identifier: Apache-2.0
"""One step of the solver's path knapsack, and the copy of the streams it chose.

`dp_relax`: the error of a candidate x to the target t is the mean over the tokens of
    0.5 * |x / |x| - t / |t||^2 = 1 - cos(x, t), exact where the cosine is close to 1;
its saving is saved[parent] + savings[mode]. A program takes a few tokens of one branch in all
modes, so that the target's states are read once for them. The last program to arrive adds up the
tokens and chooses (dp_select.py).
Padding: dead branches are not read; of the M (rows_out) rows free ones repeat the target's values.
Aliasing: outputs are fresh; inputs may overlap, their strides over branches and tokens may be 0.
Launches on one device share the arrival counter and must be ordered, as those of one stream are.

`gather_branches`: out[i] = stack(full, window, skip)[rows[i]]. A program copies one block of one
branch; a launch of its own, because the one program that chooses would copy at the speed of one SM.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from knapspec_vllm.kernels.dp_select import choose_branches
from knapspec_vllm.kernels.relaxed import TOLERANCE, Relaxed


@triton.jit
def _unit(
    # [BLOCK_TOKENS, BLOCK_DIM]
    states,
):
    states = states.to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(states * states, axis=1))
    return states * tl.div_rn(1.0, tl.maximum(norm, 1e-12))[:, None]


@triton.jit
def _apart(
    # [BLOCK_TOKENS, BLOCK_DIM]
    states,
    # [BLOCK_TOKENS, BLOCK_DIM] float32, of length 1
    target,
):
    """Sum over the tokens of 0.5 * |unit(states) - target|^2."""
    difference = _unit(states) - target
    return 0.5 * tl.sum(tl.sum(difference * difference, axis=1), axis=0)


@triton.jit(do_not_specialize=["branches", "rows_out"])
def _dp_relax_kernel(
    # [N, R, d] each
    full_ptr,
    window_ptr,
    skip_ptr,
    # [N] float32
    saved_ptr,
    # [N] bool
    alive_ptr,
    # [3] float32
    savings_ptr,
    # [3, M] int32: rows, parents, modes
    choice_ptr,
    # [2, M] float32: saved, error
    values_ptr,
    # [M] bool
    new_alive_ptr,
    # [tiles, pool] float32: sums over the tokens of a tile; then [5, pool] for _choose
    sums_ptr,
    # [1] int32, 0 between launches
    arrivals_ptr,
    branches,
    rows_out,
    num_tokens,
    dim,
    full_stride,
    full_token_stride,
    window_stride,
    window_token_stride,
    skip_stride,
    skip_token_stride,
    max_error,
    max_saving,
    exchange_rate,
    WINDOW: tl.constexpr,
    SKIP: tl.constexpr,
    TOLERANCE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_POOL: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    branch = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tokens = (tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    pool = branches * (1 + WINDOW + SKIP)

    # All loads first: behind the barriers of the sums they would wait for each other.
    inside = (tokens < num_tokens) & (dims < dim)
    places = full_ptr + tokens * full_token_stride + dims
    target = tl.load(places, mask=inside, other=0.0)
    inside = inside & (dims < tl.where(tl.load(alive_ptr + branch) | (branch == 0), dim, 0))
    full = tl.load(places + branch * full_stride, mask=inside, other=0.0)
    if WINDOW:
        places = window_ptr + branch * window_stride + tokens * window_token_stride + dims
        window = tl.load(places, mask=inside, other=0.0)
    if SKIP:
        places = skip_ptr + branch * skip_stride + tokens * skip_token_stride + dims
        skip = tl.load(places, mask=inside, other=0.0)
    target = _unit(target)
    sums = sums_ptr + tile * pool + branch
    tl.store(sums, _apart(full, target))
    if WINDOW:
        tl.store(sums + branches, _apart(window, target))
    if SKIP:
        tl.store(sums + branches * (1 + WINDOW), _apart(skip, target))

    tl.debug_barrier()  # the arrival must not overtake another thread's store
    tiles = tl.num_programs(1)
    if tl.atomic_add(arrivals_ptr, 1) == tl.num_programs(0) * tiles - 1:
        tl.store(arrivals_ptr, 0)
        choose_branches(
            saved_ptr, alive_ptr, savings_ptr, choice_ptr, values_ptr, new_alive_ptr, sums_ptr,
            tiles, branches, rows_out, num_tokens, max_error, max_saving, exchange_rate,
            WINDOW, SKIP, TOLERANCE, BLOCK_TILES, BLOCK_POOL, BLOCK_OTHERS,
        )  # fmt: skip


@triton.jit
def _gather_branches_kernel(
    # [N, lines, size] each
    full_ptr,
    window_ptr,
    skip_ptr,
    # [M] int32
    rows_ptr,
    # [M, lines, size]
    out_ptr,
    branches,
    size,
    full_stride,
    full_line_stride,
    window_stride,
    window_line_stride,
    skip_stride,
    skip_line_stride,
    WINDOW: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    branch = tl.program_id(0).to(tl.int64)
    line = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + branch).to(tl.int64)
    slot = row // branches
    parent = row % branches
    source = full_ptr + parent * full_stride + line * full_line_stride + place
    values = tl.load(source, mask=place < tl.where(slot == 0, size, 0), other=0.0)
    if WINDOW:
        source = window_ptr + parent * window_stride + line * window_line_stride + place
        values = tl.load(source, mask=place < tl.where(slot == 1, size, 0), other=values)
    if SKIP:
        source = skip_ptr + parent * skip_stride + line * skip_line_stride + place
        values = tl.load(source, mask=place < tl.where(slot == 1 + WINDOW, size, 0), other=values)
    tl.store(
        out_ptr + (branch * tl.num_programs(2) + line) * size + place, values, mask=place < size
    )


def dp_relax(
    # [N, R, d]
    full: torch.Tensor,
    # [N, R, d]
    window: torch.Tensor | None,
    # [N, R, d]
    skip: torch.Tensor | None,
    # [N] float32
    saved: torch.Tensor,
    # [N] bool
    alive: torch.Tensor,
    # [3] float32
    savings: torch.Tensor,
    *,
    rows_out: int,
    prune_cosine: float,
    max_saving: float,
    exchange_rate: float,
) -> Relaxed:
    """The rows_out - 1 best of all modes of all branches, and the target as row 0; see the twin.

    Raises ValueError for streams that are not dense over d.
    """
    number, tokens, dim = full.shape
    pool = number * (1 + (window is not None) + (skip is not None))
    block_dim = triton.next_power_of_2(dim)
    # 16 elements of each stream a thread: the loads of all modes fit in registers at once, and 33
    # branches of 32 tokens give an H100 two programs an SM from d = 512 on.
    block_tokens = min(max(4096 // block_dim, 1), triton.next_power_of_2(tokens))
    tiles = triton.cdiv(tokens, block_tokens)
    block_pool = triton.next_power_of_2(pool)
    choice = torch.empty(3, rows_out, dtype=torch.int32, device=full.device)
    values = torch.empty(2, rows_out, dtype=torch.float32, device=full.device)
    new_alive = torch.empty(rows_out, dtype=torch.bool, device=full.device)
    sums = torch.empty((tiles + 5) * pool, dtype=torch.float32, device=full.device)
    _dp_relax_kernel[number, tiles](
        full,
        full if window is None else window,
        full if skip is None else skip,
        saved.contiguous(),
        alive.contiguous(),
        savings.contiguous(),
        choice,
        values,
        new_alive,
        sums,
        _arrivals(full.device),
        number,
        rows_out,
        tokens,
        dim,
        *_strides(full, window, skip),
        1.0 - prune_cosine,
        max_saving,
        exchange_rate,
        WINDOW=window is not None,
        SKIP=skip is not None,
        TOLERANCE=TOLERANCE,
        BLOCK_TOKENS=block_tokens,
        BLOCK_DIM=block_dim,
        BLOCK_TILES=min(triton.next_power_of_2(tiles), 16),
        BLOCK_POOL=block_pool,
        # 8 pairs a thread: more registers would leave an SM fewer programs to stream states with.
        BLOCK_OTHERS=min(max(2048 // block_pool, 4), block_pool),
        num_warps=8,
        # A score rounded once more or less than the twin's would order near-ties differently.
        enable_fp_fusion=False,
    )
    return Relaxed(*choice.unbind(), *values.unbind(), new_alive)


def gather_branches(
    # [N, R, d]
    full: torch.Tensor,
    # [N, R, d]
    window: torch.Tensor | None,
    # [N, R, d]
    skip: torch.Tensor | None,
    # [M] int32
    rows: torch.Tensor,
) -> torch.Tensor:
    """The streams [M, R, d] at `rows` of full, window and skip stacked; a copy.

    Raises ValueError for streams that are not dense over d.
    """
    number, tokens, dim = full.shape
    flat = all(states is None or states.stride(1) == dim for states in (full, window, skip))
    lines, size = (1, tokens * dim) if flat else (tokens, dim)
    out = full.new_empty(len(rows), tokens, dim)
    # Two 16-byte loads of bf16 a thread; 33 branches of 32 x 576 still make 2.5 programs an SM.
    block = 2048
    _gather_branches_kernel[len(rows), triton.cdiv(size, block), lines](
        full,
        full if window is None else window,
        full if skip is None else skip,
        rows.contiguous(),
        out,
        number,
        size,
        *_strides(full, window, skip),
        WINDOW=window is not None,
        SKIP=skip is not None,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _strides(
    # [N, R, d] each
    *streams: torch.Tensor | None,
) -> list[int]:
    """Of branches and of tokens, elements, for full, window and skip; 0 for one not given."""
    strides = []
    for states in streams:
        if states is not None and states.shape[-1] > 1 and states.stride(-1) != 1:
            raise ValueError(f"streams must be dense over d, got strides {states.stride()}")
        strides += [0, 0] if states is None else [states.stride(0), states.stride(1)]
    return strides


@functools.cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """[1] int32: the counter of the device, which every launch leaves at 0."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Zeroed inside a graph it would be garbage to every launch before the first replay.
        raise RuntimeError("dp_relax has to run once on a device before it is captured there")
    return torch.zeros(1, dtype=torch.int32, device=device)
