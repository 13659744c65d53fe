# SPDX-License-Identifier: Apache-2.0
"""WINDOW attention by block tables: the sink blocks and the last blocks of the paged KV.

Keys are cached already rotated, so attention over a subset of a sequence needs no special kernel: a
block table that lists the kept blocks and the matching length serve any paged backend. The window
is whole blocks: at least `window_tokens` recent tokens, and the blocks that hold the first
`sink_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowGeometry:
    """Sizes of the kept part, in blocks of block_size tokens."""

    block_size: int
    sink_blocks: int
    window_tokens: int

    @classmethod
    def of(cls, sink_tokens: int, window_tokens: int, block_size: int) -> WindowGeometry:
        return cls(block_size, -(-sink_tokens // block_size), window_tokens)

    def first_block(self, length: int) -> int:
        """First block of the window of a sequence of `length` tokens (at least sink_blocks)."""
        return max(self.sink_blocks, (length - self.window_tokens) // self.block_size)

    def kept_tokens(self, length: int) -> int:
        """Tokens that WINDOW attention reads in a sequence of `length` tokens."""
        return length - (self.first_block(length) - self.sink_blocks) * self.block_size


@dataclass(frozen=True)
class WindowTables:
    """block_table [B, K] int32 of kept blocks; dropped [B] int64 tokens left out of each row."""

    block_table: torch.Tensor
    dropped: torch.Tensor


def window_tables(
    geometry: WindowGeometry,
    # [B, num_blocks] int32
    block_table: torch.Tensor,
    # [B] int64
    positions: torch.Tensor,
    draft_length: int,
) -> WindowTables:
    """Tables that stay valid while each row advances by `draft_length` tokens from `positions`."""
    bs, sinks = geometry.block_size, geometry.sink_blocks
    first = (
        (positions + 1 - geometry.window_tokens).div(bs, rounding_mode="floor").clamp_(min=sinks)
    )
    width = (geometry.window_tokens + bs - 1 + draft_length) // bs + 1
    device = block_table.device
    window = first[:, None] + torch.arange(width, device=device)
    sink = torch.arange(sinks, device=device).expand(len(positions), sinks)
    columns = torch.cat([sink, window], dim=1).clamp_(max=block_table.shape[1] - 1)
    return WindowTables(block_table.gather(1, columns), (first - sinks) * bs)
