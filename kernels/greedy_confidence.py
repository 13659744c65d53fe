# SPDX-License-Identifier: Apache-2.0
"""Most likely token of each row of logits and its softmax probability, in one pass.

    id = argmax_v logit[v], the first of equal ones
    probability = 1 / sum_v exp(logit[v] - logit[id])

`_partials_kernel`: program (row, split) goes over one part of the row's vocabulary and keeps the
maximum, its first index and the sum of exp(logit - maximum). With a single split it writes the
result; else `_merge_kernel`, one program a row, merges the splits, as it merges the shards of a
vocabulary-parallel head.

-inf logits have probability 0. A row without any other logit gives its first id, maximum -inf,
total 0 and probability 0. A NaN logit makes its row's probability NaN; the id is then a valid one.
Every row is computed, padding too. Results never alias the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Finite, so that "logit - maximum" is not NaN before the first finite logit or without one.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


# Batch sizes change while a server runs; they must not be part of a compiled kernel's key.
@triton.jit(do_not_specialize=["rows", "first_token", "steps"])
def _partials_kernel(
    # [B, V], any float dtype
    logits_ptr,
    # [S, B] int64, float32, float32; with FINISH S is 1 and total gets the probabilities
    ids_ptr,
    maximum_ptr,
    total_ptr,
    rows,
    valid,
    first_token,
    # vocabulary of a program, in steps of BLOCK columns
    steps,
    row_stride,
    column_stride,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * steps * BLOCK
    lane = tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * row_stride
    # Each lane keeps a maximum, a sum and an index of its own: nothing crosses threads in the loop.
    maximum = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    index = start + lane
    for step in range(steps):
        column = start + step * BLOCK + lane
        address = row_ptr + column.to(tl.int64) * column_stride
        logit = tl.load(address, mask=column < valid, other=float("-inf")).to(tl.float32)
        difference = logit - maximum
        # One exponential serves both cases: of the new term, or of the old sum's correction.
        decay = tl.exp(-tl.abs(difference))
        higher = difference > 0
        total = tl.where(higher, total * decay + 1.0, total + decay)
        index = tl.where(higher, column, index)
        maximum = tl.where(higher, logit, maximum)

    highest = tl.max(maximum, axis=0)
    sum_exp = tl.sum(total * tl.exp(maximum - highest), axis=0)
    first = tl.min(tl.where(maximum == highest, index, 2147483647), axis=0)
    out = split.to(tl.int64) * rows + row
    tl.store(ids_ptr + out, first.to(tl.int64) + first_token)
    if FINISH:
        tl.store(total_ptr + row, tl.where(sum_exp == 0.0, 0.0, 1.0 / sum_exp))
    else:
        tl.store(maximum_ptr + out, tl.where(sum_exp == 0.0, float("-inf"), highest))
        tl.store(total_ptr + out, sum_exp)


@triton.jit(
    do_not_specialize=["parts", "ids_stride", "maximum_stride", "total_stride"],
    # Partials of other ranks may lie anywhere in one buffer.
    do_not_specialize_on_alignment=["ids_ptr", "maximum_ptr", "total_ptr"],
)
def _merge_kernel(
    # [K, B] int64, float32, float32
    ids_ptr,
    maximum_ptr,
    total_ptr,
    # [B] int64, float32, float32; with FINISH merged_total gets the probabilities
    merged_ids_ptr,
    merged_maximum_ptr,
    merged_total_ptr,
    parts,
    # from a part to the next; rows are dense
    ids_stride,
    maximum_stride,
    total_stride,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK).to(tl.int64)
    exists = part < parts
    maximum = tl.load(
        maximum_ptr + part * maximum_stride + row, mask=exists, other=float("-inf")
    ).to(tl.float32)
    total = tl.load(total_ptr + part * total_stride + row, mask=exists, other=0.0).to(tl.float32)
    # Parts are in vocabulary order, so the first of equal maxima has the lowest id.
    best = tl.argmax(maximum, axis=0, tie_break_left=True).to(tl.int64)
    best = tl.minimum(best, parts - 1)  # a lane past the parts can win against NaN
    token = tl.load(ids_ptr + best * ids_stride + row)
    highest = tl.maximum(tl.max(maximum, axis=0), _LOWEST)
    sum_exp = tl.sum(total * tl.exp(maximum - highest), axis=0)
    tl.store(merged_ids_ptr + row, token)
    if FINISH:
        tl.store(merged_total_ptr + row, tl.where(sum_exp == 0.0, 0.0, 1.0 / sum_exp))
    else:
        tl.store(merged_maximum_ptr + row, tl.where(sum_exp == 0.0, float("-inf"), highest))
        tl.store(merged_total_ptr + row, sum_exp)


# Sixteen elements a thread: two 16-byte loads of bf16 in flight, state within 64 registers.
_BLOCK = 2048
_WARPS = 4
# About eight programs for each multiprocessor of an H100: what is resident at once. More only adds
# partials to merge.
_PROGRAMS = 1024


def greedy_confidence(
    # [B, V], any float dtype
    logits: torch.Tensor,
    *,
    confident: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token of each row and its softmax probability.

    Returns token ids `int64` [B] and probabilities `float32` [B]. The first of equal logits wins.
    confident is the twin's: here the probability costs nothing beyond the pass over the logits.
    """
    ids, maximum, total = _partials(logits, 0, logits.shape[1], finish=True)
    if len(ids) == 1:
        return ids[0], total[0]
    return merge_greedy(ids, maximum, total)


def greedy_partials(
    # [B, V_local], any float dtype
    logits: torch.Tensor,
    *,
    first_token: int,
    valid: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `merge_greedy` needs from one vocabulary shard: its first `valid` columns.

    Returns the likeliest token as a global id `int64` [B], its logit and the sum of
    exp(logit - maximum) `float32` [B]. A shard of no tokens gives first_token, -inf and 0.
    """
    ids, maximum, total = _partials(logits, first_token, valid, finish=False)
    if len(ids) == 1:
        return ids[0], maximum[0], total[0]
    return _merge(ids, maximum, total, finish=False)


def merge_greedy(
    # [K, B] int64
    ids: torch.Tensor,
    # [K, B] float32
    maximum: torch.Tensor,
    # [K, B] float32
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `int64` [B] and probabilities `float32` [B] from K shards in vocabulary order."""
    token_ids, _, probability = _merge(ids, maximum, total, finish=True)
    return token_ids, probability


def _partials(
    logits: torch.Tensor, first_token: int, valid: int, *, finish: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partials [S, B] of S parts; with `finish` and S = 1, probabilities instead of totals."""
    rows = logits.shape[0]
    blocks = triton.cdiv(valid, _BLOCK)
    steps = triton.cdiv(blocks, max(1, _PROGRAMS // max(rows, 1)))
    splits = triton.cdiv(blocks, steps) if blocks else 1
    ids = torch.empty(splits, rows, dtype=torch.int64, device=logits.device)
    maximum = torch.empty(splits, rows, dtype=torch.float32, device=logits.device)
    total = torch.empty_like(maximum)
    if rows:
        _partials_kernel[(rows, splits)](
            logits,
            ids,
            maximum,
            total,
            rows,
            valid,
            first_token,
            steps,
            *logits.stride(),
            FINISH=finish and splits == 1,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return ids, maximum, total


def _merge(
    ids: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor, *, finish: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts, rows = ids.shape
    ids, maximum, total = (t if t.stride(1) == 1 else t.contiguous() for t in (ids, maximum, total))
    merged_ids = torch.empty_like(ids[0])
    merged_maximum, merged_total = torch.empty_like(maximum[0]), torch.empty_like(total[0])
    if rows:
        _merge_kernel[(rows,)](
            ids,
            maximum,
            total,
            merged_ids,
            merged_maximum,
            merged_total,
            parts,
            ids.stride(0),
            maximum.stride(0),
            total.stride(0),
            FINISH=finish,
            BLOCK=max(128, triton.next_power_of_2(parts)),
            num_warps=1,
        )
    return merged_ids, merged_maximum, merged_total
