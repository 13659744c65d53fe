# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping between two forwards of a drafting round, for all rows in one launch.

`draft_advance`, for an active row at position p, with the drafted token t of confidence c:

    drafts[count] = t;  count += 1
    goes on if count < min(limit, G) and c >= threshold, p + 2 < max_model_len, (p + 1) // bs < W
    going on: token = t;  position = p + 1;  length = p + 2;  slot and window of that position
    stopping: active = False;  slot = -1;  the rest of the row stays as it is

`draft_start` makes rows with a limit active at their positions, under the same bounds, and clears
the drafts; it writes length and window of every row. The window of a length n, in whole blocks:

    first = max(sink_blocks, (n - window_tokens) // bs)
    table = blocks 0 .. sink_blocks - 1, then first, first + 1, ...
    tokens in it = n - (first - sink_blocks) * bs

One program serves one row. A row that is not active, padding included, is only told again that its
slot is -1. The state is changed in place; token_ids may be the state's own tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from knapspec_vllm.kernels.draft_state import DraftState


# These two come from wherever the last forward left them.
@triton.jit(
    do_not_specialize=["draft_length", "table_width", "table_stride"],
    do_not_specialize_on_alignment=["token_ids_ptr", "confidence_ptr"],
)
def _draft_advance_kernel(
    # [B] int64
    tokens_ptr,
    # [B] int64
    positions_ptr,
    # [B] int32
    lengths_ptr,
    # [B] int64
    slots_ptr,
    # [B] bool
    active_ptr,
    # [B] int32
    counts_ptr,
    # [B, G] int64
    drafts_ptr,
    # [B] int32
    limits_ptr,
    # [B, W] int32
    block_table_ptr,
    # [B, K] int32 or None
    window_table_ptr,
    # [B] int32 or None
    window_lengths_ptr,
    # [B] int64; None with START
    token_ids_ptr,
    # [B] float32; None with START
    confidence_ptr,
    threshold,
    draft_length,
    max_model_len,
    table_width,
    table_stride,
    START: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    # powers of two that hold G and K
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    limit = tl.minimum(tl.load(limits_ptr + row), draft_length)
    if START:
        count = 0
        goes_on = limit > 0
        column = tl.arange(0, BLOCK_G)
        empty = tl.full([BLOCK_G], -1, tl.int64)
        tl.store(drafts_ptr + row * draft_length + column, empty, mask=column < draft_length)
    else:
        active = tl.load(active_ptr + row)
        token = tl.load(token_ids_ptr + row)
        count = tl.load(counts_ptr + row)
        room = active & (count < draft_length)
        tl.store(drafts_ptr + row * draft_length + count, token, mask=room)
        count += active.to(tl.int32)
        goes_on = active & (count < limit) & (tl.load(confidence_ptr + row) >= threshold)
        position += 1
    block = position // BLOCK_SIZE
    fits = (position >= 0) & (position + 1 < max_model_len) & (block < table_width)
    goes_on = goes_on & fits

    table_ptr = block_table_ptr + row * table_stride
    physical = tl.load(table_ptr + block, mask=goes_on, other=0).to(tl.int64)
    slot = tl.where(goes_on, physical * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slots_ptr + row, slot)
    tl.store(active_ptr + row, goes_on)
    tl.store(counts_ptr + row, count)
    if START:
        written = row >= 0  # every row
    else:
        written = goes_on
        tl.store(tokens_ptr + row, token, mask=goes_on)
        tl.store(positions_ptr + row, position, mask=goes_on)
    length = (position + 1).to(tl.int32)
    tl.store(lengths_ptr + row, length, mask=written)

    if WINDOWED:
        # A negative dividend rounds the other way than in Python; the maximum hides the difference.
        first = tl.maximum((length - WINDOW_TOKENS) // BLOCK_SIZE, SINK_BLOCKS)
        dropped = (first - SINK_BLOCKS) * BLOCK_SIZE
        tl.store(window_lengths_ptr + row, length - dropped, mask=written)
        kept = tl.arange(0, BLOCK_K)
        logical = tl.where(kept < SINK_BLOCKS, kept, first + kept - SINK_BLOCKS)
        logical = tl.minimum(logical, table_width - 1)  # past the row's end: never read
        # Not "& written": Triton 3.9's interpreter makes an integer of it.
        inside = kept < tl.where(written, WINDOW_WIDTH, 0)
        blocks = tl.load(table_ptr + logical, mask=inside, other=0)
        tl.store(window_table_ptr + row * WINDOW_WIDTH + kept, blocks, mask=inside)


def draft_start(state: DraftState) -> None:
    """Prepares a round in place: lengths, slots and windows of the rows' positions, no drafts."""
    _launch(state, None, None, 0.0)


def draft_advance(
    state: DraftState,
    # [B] int64
    token_ids: torch.Tensor,
    # [B] float32
    confidence: torch.Tensor,
    *,
    threshold: float,
) -> None:
    """Takes one drafted token per active row, in place; see the top of this file."""
    _launch(state, token_ids, confidence, threshold)


def _launch(
    state: DraftState,
    token_ids: torch.Tensor | None,
    confidence: torch.Tensor | None,
    threshold: float,
) -> None:
    rows, draft_length = state.drafts.shape
    if not rows:
        return
    window_width = 0 if state.window_table is None else state.window_table.shape[1]
    _draft_advance_kernel[(rows,)](
        state.tokens,
        state.positions,
        state.lengths,
        state.slots,
        state.active,
        state.counts,
        state.drafts,
        state.limits,
        state.block_table,
        state.window_table,
        state.window_lengths,
        None if token_ids is None else token_ids.contiguous(),
        None if confidence is None else confidence.contiguous(),
        threshold,
        draft_length,
        state.max_model_len,
        state.block_table.shape[1],
        state.block_table.stride(0),
        START=token_ids is None,
        WINDOWED=state.window_table is not None,
        BLOCK_SIZE=state.block_size,
        SINK_BLOCKS=state.sink_blocks,
        WINDOW_TOKENS=state.window_tokens,
        WINDOW_WIDTH=window_width,
        BLOCK_G=triton.next_power_of_2(draft_length),
        BLOCK_K=triton.next_power_of_2(max(window_width, 1)),
        # A program reads and writes the same scalars; within one warp that needs no barrier.
        num_warps=1,
    )
