# SPDX-License-Identifier: Apache-2.0
"""The rows of one drafting round, held on the device.

Which rows still draft, where each stands and what it has drafted are tensors that `draft_start` and
`draft_advance` change in place: a round of forwards needs no look at them from the host, and their
addresses stay the same from round to round, as CUDA graphs want.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class DraftState:
    """B rows that draft up to G tokens each; all tensors on one device.

    Padding rows have limit 0: they are never active, and their slot is -1. With position -1 their
    lengths are 0 as well, which makes attention skip them; captured steps leave them at position 0,
    which rotary embeddings can look up.
    """

    # [B] int64: input of the next forward
    tokens: torch.Tensor
    # [B] int64: position of that token
    positions: torch.Tensor
    # [B] int32: positions + 1, what FULL attention sees
    lengths: torch.Tensor
    # [B] int64: where K/V of that token go; -1 to write nothing
    slots: torch.Tensor
    # [B] bool: rows that the next forward drafts for
    active: torch.Tensor
    # [B] int32: tokens drafted so far
    counts: torch.Tensor
    # [B, G] int64: the drafts, filled up with -1
    drafts: torch.Tensor
    # [B] int32: most tokens each row may draft (G caps it too)
    limits: torch.Tensor
    # [B, W] int32, any row stride: physical block of each block of the row
    block_table: torch.Tensor
    # [B, K] int32: the blocks WINDOW attention sees at the current lengths; None where nobody
    # reads them
    window_table: torch.Tensor | None
    # [B] int32: tokens it sees in them
    window_lengths: torch.Tensor | None
    #: Tokens a block holds.
    block_size: int
    #: Blocks at the start of a sequence that WINDOW keeps.
    sink_blocks: int
    #: Recent tokens that WINDOW keeps, rounded up to whole blocks.
    window_tokens: int
    #: No token at or past this position is ever drafted.
    max_model_len: int

    def __post_init__(self) -> None:
        rows, most = self.drafts.shape
        if not most or not self.block_table.shape[1]:
            raise ValueError("a draft state needs room for a draft token and for a block")
        wanted = {
            "tokens": (torch.int64, (rows,)),
            "positions": (torch.int64, (rows,)),
            "lengths": (torch.int32, (rows,)),
            "slots": (torch.int64, (rows,)),
            "active": (torch.bool, (rows,)),
            "counts": (torch.int32, (rows,)),
            "drafts": (torch.int64, (rows, most)),
            "limits": (torch.int32, (rows,)),
            "block_table": (torch.int32, (rows, self.block_table.shape[1])),
        }
        if (self.window_table is None) != (self.window_lengths is None):
            raise ValueError("window_table and window_lengths come together or not at all")
        if self.window_table is not None:
            width = window_width(self.block_size, self.sink_blocks, self.window_tokens)
            wanted["window_table"] = (torch.int32, (rows, width))
            wanted["window_lengths"] = (torch.int32, (rows,))
        for name, (dtype, shape) in wanted.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted {dtype} {shape}"
                )
            dense = tensor.stride(1) == 1 if name == "block_table" else tensor.is_contiguous()
            if not dense:
                raise ValueError(f"{name} has strides {tensor.stride()}: rows must be dense")

    @classmethod
    def allocate(
        cls,
        rows: int,
        draft_length: int,
        # [rows, W] int32, any row stride; kept, not copied
        block_table: torch.Tensor,
        *,
        block_size: int,
        max_model_len: int,
        sink_blocks: int = 0,
        window_tokens: int = 0,
    ) -> DraftState:
        """State of padding rows only, on the table's device; window_tokens > 0 makes windows."""

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=block_table.device)

        window_table = window_lengths = None
        if window_tokens:
            width = window_width(block_size, sink_blocks, window_tokens)
            window_table = zeros(torch.int32, rows, width)
            window_lengths = zeros(torch.int32, rows)
        return cls(
            tokens=zeros(torch.int64, rows),
            positions=zeros(torch.int64, rows) - 1,
            lengths=zeros(torch.int32, rows),
            slots=zeros(torch.int64, rows) - 1,
            active=zeros(torch.bool, rows),
            counts=zeros(torch.int32, rows),
            drafts=zeros(torch.int64, rows, draft_length) - 1,
            limits=zeros(torch.int32, rows),
            block_table=block_table,
            window_table=window_table,
            window_lengths=window_lengths,
            block_size=block_size,
            sink_blocks=sink_blocks,
            window_tokens=window_tokens,
            max_model_len=max_model_len,
        )


def window_width(block_size: int, sink_blocks: int, window_tokens: int) -> int:
    """Blocks a row's window table needs at any one length."""
    return sink_blocks + (window_tokens + block_size - 1) // block_size + 1
