# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch that may draft this round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from knapspec_vllm import ops


@dataclass(frozen=True)
class Candidates:
    """The same rows as plain numbers, on which a round is decided before any tensor is made."""

    #: Index of each row in the runner's batch.
    index: list[int]
    req_ids: list[str]
    #: Newest token of each row, and its position.
    tokens: list[int]
    positions: list[int]
    #: Most tokens each row may draft: its request, allocated slots and max_model_len considered.
    bounds: list[int]
    #: Tokens each may still produce by its max_tokens; 0 or less: it has ended.
    left: list[int]
    #: Rows whose request wants no speculation.
    opted_out: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def limits(self) -> list[int]:
        """Most tokens of each that can be kept: what its max_tokens leaves as well."""
        pairs = zip(self.bounds, self.left, strict=True)
        return [max(0, min(bound, left - 1)) for bound, left in pairs]

    @property
    def context_tokens(self) -> int:
        """Sum of context lengths, the newest tokens included."""
        return sum(self.positions) + len(self.positions)

    @property
    def room(self) -> tuple[float, ...]:
        """See `Batch.room`."""
        longest = max(self.limits)
        if min(self.limits) == longest:
            return ()
        return tuple(
            sum(limit > position for limit in self.limits) / len(self.limits)
            for position in range(longest)
        )

    def to_rows(self, block_table: torch.Tensor, device: torch.device) -> DraftRows:
        """block_table: the runner's [rows of its batch, num_blocks] int32, on the device."""
        where = ops.to_device(self.index, torch.int64, device)
        return DraftRows(
            index=self.index,
            req_ids=self.req_ids,
            tokens=ops.to_device(self.tokens, torch.int64, device),
            positions=ops.to_device(self.positions, torch.int64, device),
            host_positions=self.positions,
            limits=self.limits,
            block_table=block_table.index_select(0, where),
        )


@dataclass
class DraftRows:
    """B decoding requests, each with one newest token whose K/V the target has not computed yet.

    Position P of that token is where drafting starts: forward i of a round consumes the token at
    P + i, writes K/V there (in the layers the plan runs) and proposes the token at P + i + 1. The
    next verify step recomputes P, P + 1, ... in every layer before anything reads them.
    """

    index: list[int]
    req_ids: list[str]
    #: [B] int64, on the device: newest token of each row.
    tokens: torch.Tensor
    #: [B] int64, on the device: its position P.
    positions: torch.Tensor
    #: The same positions on the host.
    host_positions: list[int]
    limits: list[int]
    #: [B, num_blocks] int32, on the device.
    block_table: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    def enter(self, state: ops.DraftState, draft_length: int) -> None:
        """Starts a round of up to `draft_length` tokens in a state with room for these rows.

        Its other rows become padding: at position 0, which rotary embeddings can look up.
        """
        count, device = len(self), state.limits.device
        limits = [min(limit, draft_length) for limit in self.limits]
        padding = [0] * (len(state.tokens) - count)
        state.tokens[:count].copy_(self.tokens)
        state.positions[count:].zero_()
        state.positions[:count].copy_(self.positions)
        state.limits.copy_(ops.to_device(limits + padding, torch.int32, device))
        if state.block_table is not self.block_table:
            width = min(state.block_table.shape[1], self.block_table.shape[1])
            state.block_table[:count, :width].copy_(self.block_table[:, :width])
        ops.draft_start(state)
