# SPDX-License-Identifier: Apache-2.0
"""The part of `dp_relax` that runs in its last program: which candidates go on as branches.

The rules are those of the eager twin. What has to be known of a candidate's place among the others
(is it dominated, does it lead its range of saving, how many go before it) are counts over pairs of
candidates, taken in chunks: nothing is sorted, and any number of candidates will do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _before(
    # [pool] float32
    score_ptr,
    # [BLOCK_OTHERS]
    other,
    pool,
    # [BLOCK_POOL] float32
    score,
    # [BLOCK_POOL]
    index,
):
    """[BLOCK_POOL, BLOCK_OTHERS]: the other one scores more, or the same at a lower index."""
    scores = tl.load(score_ptr + other, mask=other < pool, other=float("-inf"))[None, :]
    earlier = other[None, :] < index[:, None]
    return (scores > score[:, None]) | ((scores == score[:, None]) & earlier)


@triton.jit
def _choose(
    # [BLOCK_POOL] float32
    saving,
    # [BLOCK_POOL] float32
    error,
    # [BLOCK_POOL] bool
    allowed,
    # [5, pool] float32
    scratch_ptr,
    pool,
    live,
    exchange_rate,
    TOLERANCE: tl.constexpr,
    BLOCK_POOL: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Which candidates remain, and each one's place among them, best first; see the twin."""
    index = tl.arange(0, BLOCK_POOL)
    exists = index < pool
    # A saving of -inf is as good as no other: it dominates nothing.
    tl.store(scratch_ptr + index, tl.where(allowed, saving, float("-inf")), mask=exists)
    tl.store(scratch_ptr + pool + index, error, mask=exists)
    tl.debug_barrier()
    dominators = tl.zeros([BLOCK_POOL], tl.int32)
    for start in range(0, pool, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        savings = tl.load(scratch_ptr + other, mask=other < pool, other=float("-inf"))
        errors = tl.load(scratch_ptr + pool + other, mask=other < pool, other=0.0)
        more = savings[None, :] - saving[:, None]
        less = errors[None, :] - error[:, None]
        as_good = (more >= -TOLERANCE) & (less <= TOLERANCE)
        better = (more > TOLERANCE) | (less < -TOLERANCE) | (other[None, :] < index[:, None])
        dominators += tl.sum((as_good & better).to(tl.int32), axis=1)
    allowed = allowed & (dominators == 0)

    score = tl.where(allowed, exchange_rate * saving - error, float("-inf"))
    reach = tl.maximum(tl.max(tl.where(allowed, saving, 0.0), axis=0), TOLERANCE)
    # Whole numbers are exact in float32. IEEE division: edges of ranges as in the twin.
    bin_of = tl.floor(tl.div_rn(saving, reach) * live)
    bin_of = tl.minimum(tl.maximum(bin_of, 0.0), live - 1.0)
    tl.store(scratch_ptr + 2 * pool + index, score, mask=exists)
    tl.store(scratch_ptr + 3 * pool + index, bin_of, mask=exists)
    tl.debug_barrier()
    ahead = tl.zeros([BLOCK_POOL], tl.int32)
    for start in range(0, pool, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        bins = tl.load(scratch_ptr + 3 * pool + other, mask=other < pool, other=-1.0)
        before = _before(scratch_ptr + 2 * pool, other, pool, score, index)
        ahead += tl.sum((before & (bins[None, :] == bin_of[:, None])).to(tl.int32), axis=1)

    # 1 leads its range, 0 does not, -1 is no candidate.
    rank = tl.where(allowed, tl.where(ahead == 0, 1.0, 0.0), -1.0)
    tl.store(scratch_ptr + 4 * pool + index, rank, mask=exists)
    tl.debug_barrier()
    place = tl.zeros([BLOCK_POOL], tl.int32)
    for start in range(0, pool, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        ranks = tl.load(scratch_ptr + 4 * pool + other, mask=other < pool, other=-1.0)[None, :]
        before = _before(scratch_ptr + 2 * pool, other, pool, score, index)
        first = (ranks > rank[:, None]) | ((ranks == rank[:, None]) & before)
        place += tl.sum(first.to(tl.int32), axis=1)
    return allowed, place


@triton.jit
def _write(
    choice_ptr, values_ptr, alive_ptr, branches, rows_out,
    where, mask, row, mode, saving, error, alive,
):  # fmt: skip
    """Output rows `where`, all arguments from there on [BLOCK_POOL]."""
    tl.store(choice_ptr + where, row, mask=mask)
    tl.store(choice_ptr + rows_out + where, row % branches, mask=mask)
    tl.store(choice_ptr + 2 * rows_out + where, mode, mask=mask)
    tl.store(values_ptr + where, saving, mask=mask)
    tl.store(values_ptr + rows_out + where, error, mask=mask)
    tl.store(alive_ptr + where, alive, mask=mask)


@triton.jit
def choose_branches(
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
    # [tiles, pool] float32: errors summed over the tokens of a tile; then room for [5, pool]
    sums_ptr,
    tiles,
    branches,
    rows_out,
    num_tokens,
    max_error,
    max_saving,
    exchange_rate,
    WINDOW: tl.constexpr,
    SKIP: tl.constexpr,
    TOLERANCE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_POOL: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """All outputs of dp_relax, from the sums of all programs; M is rows_out."""
    pool = branches * (1 + WINDOW + SKIP)
    index = tl.arange(0, BLOCK_POOL)
    exists = index < pool
    error = tl.zeros([BLOCK_POOL], tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)[:, None]
        inside = (tile < tiles) & exists[None, :]
        # Not through the L1 cache, which does not see other SMs' stores.
        sums = sums_ptr + tile * pool + index[None, :]
        error += tl.sum(tl.load(sums, mask=inside, other=0.0, cache_modifier=".cg"), axis=0)
    error = error / num_tokens
    parent = index % branches
    mode = index // branches * (1 if WINDOW else 2)
    allowed = exists & tl.load(alive_ptr + parent) & (error <= max_error)
    saving = tl.load(saved_ptr + parent)
    if WINDOW or SKIP:
        gain = tl.load(savings_ptr + mode, mask=exists, other=0.0)
        saving += gain
        # FULL of the target is row 0, not a branch of its own.
        allowed = allowed & (index != 0) & (gain >= 0.0) & (saving <= max_saving)
        allowed, place = _choose(
            saving, error, allowed, sums_ptr + tiles * pool, pool, rows_out - 1, exchange_rate,
            TOLERANCE, BLOCK_POOL, BLOCK_OTHERS,
        )  # fmt: skip
        _write(
            choice_ptr, values_ptr, new_alive_ptr, branches, rows_out, place + 1,
            allowed & (place < rows_out - 1), index, mode, saving, error, allowed,
        )  # fmt: skip
        is_target = index == 0
        free = is_target | (index > tl.sum(allowed.to(tl.int32), axis=0))
        none = tl.zeros([BLOCK_POOL], tl.int32)
        saving = tl.sum(tl.where(is_target, saving, 0.0), axis=0) + none
        error = tl.sum(tl.where(is_target, error, 0.0), axis=0) + none
        _write(
            choice_ptr, values_ptr, new_alive_ptr, branches, rows_out, index,
            free & (index < rows_out), none, none, saving, error, is_target,
        )  # fmt: skip
    else:
        _write(
            choice_ptr, values_ptr, new_alive_ptr, branches, rows_out, index,
            exists, index, mode, saving, error, allowed | (index == 0),
        )  # fmt: skip
