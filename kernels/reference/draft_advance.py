# SPDX-License-Identifier: Apache-2.0
"""Eager twins of `draft_start` and `draft_advance`."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.draft_state import DraftState


def draft_start(state: DraftState) -> None:
    """Prepares a round in place: lengths, slots and windows of the rows' positions, no drafts.

    Rows with a limit become active, unless the model or the row's blocks end at their position.
    """
    state.drafts.fill_(-1)
    state.counts.zero_()
    _enter(state, state.limits > 0, state.positions, every_row=True)


def draft_advance(
    state: DraftState,
    # [B] int64
    token_ids: torch.Tensor,
    # [B] float32
    confidence: torch.Tensor,
    *,
    threshold: float,
) -> None:
    """Takes one drafted token per active row, in place.

    The token is noted. The row goes on unless it has drafted as many as it may, the confidence is
    under the threshold (or NaN), or the model or the row's blocks end. A row that goes on has the
    token as its next input, one position on; one that stops keeps everything but its slot.
    """
    most = state.drafts.shape[1]
    column = state.counts.clamp(max=most - 1).long()[:, None]
    noted = torch.where(state.active[:, None], token_ids[:, None], state.drafts.gather(1, column))
    state.drafts.scatter_(1, column, noted)
    state.counts.add_(state.active)
    wanted = state.active & (state.counts < state.limits.clamp(max=most))
    wanted &= confidence >= threshold
    _enter(state, wanted, state.positions + 1, every_row=False)
    state.tokens.copy_(torch.where(state.active, token_ids, state.tokens))


def _enter(
    state: DraftState,
    # [B] bool
    wanted: torch.Tensor,
    # [B] int64
    positions: torch.Tensor,
    *,
    every_row: bool,
) -> None:
    """Puts rows at their next positions: those that go on, or every row."""
    size, width = state.block_size, state.block_table.shape[1]
    # Drafting at position p is for the token at p + 1, which has to be below max_model_len too.
    end = min(state.max_model_len - 1, width * size)
    torch.logical_and(wanted, (positions >= 0) & (positions < end), out=state.active)
    block = (positions // size).clamp(0, width - 1)[:, None]
    slots = state.block_table.gather(1, block)[:, 0].long() * size + positions % size
    state.slots.copy_(torch.where(state.active, slots, -1))

    changes: list[tuple[torch.Tensor, torch.Tensor]] = [(state.positions, positions)]
    lengths = (positions + 1).int()
    changes.append((state.lengths, lengths))
    if state.window_table is not None and state.window_lengths is not None:
        sinks = state.sink_blocks
        first = ((lengths - state.window_tokens) // size).clamp_(min=sinks)
        changes.append((state.window_lengths, lengths - (first - sinks) * size))
        kept = torch.arange(state.window_table.shape[1], device=first.device)
        logical = torch.where(kept < sinks, kept, first[:, None] + (kept - sinks))
        # Columns past the row's end are never read.
        table = state.block_table.gather(1, logical.clamp_(max=width - 1))
        changes.append((state.window_table, table))
    for target, value in changes:
        if not every_row:
            going = state.active if target.dim() == 1 else state.active[:, None]
            value = torch.where(going, value, target)
        target.copy_(value)
