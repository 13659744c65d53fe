# SPDX-License-Identifier: Apache-2.0
"""WINDOW attention by block tables: the sink blocks and the last blocks of the paged KV.

Keys are cached already rotated, so attention over a subset of a sequence needs no special kernel: a
block table that lists the kept blocks and the matching length serve any paged backend. The window
is whole blocks: at least `window_tokens` recent tokens, and the blocks that hold the first
`sink_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WindowGeometry:
    """Sizes of the kept part, in blocks of block_size tokens."""

    block_size: int
    sink_blocks: int
    window_tokens: int

    @classmethod
    def of(cls, sink_tokens: int, window_tokens: int, block_size: int) -> WindowGeometry:
        return cls(block_size, -(-sink_tokens // block_size), window_tokens)

    @property
    def sink_slots(self) -> int:
        """Tokens in the sink blocks."""
        return self.sink_blocks * self.block_size

    def first_block(self, length: int) -> int:
        """First block of the window of a sequence of `length` tokens (at least sink_blocks)."""
        return max(self.sink_blocks, (length - self.window_tokens) // self.block_size)

    def kept_tokens(self, length: int) -> int:
        """Tokens that WINDOW attention reads in a sequence of `length` tokens."""
        return length - (self.first_block(length) - self.sink_blocks) * self.block_size

    def attention_options(self, module: Any, windowed: bool) -> dict[str, Any]:
        """What the attention ops need to know of a vLLM `Attention` module and of the mode."""
        return {
            "scale": module.impl.scale,
            "sinks": self.sink_slots if windowed else 0,
            "window": self.window_tokens if windowed else 0,
            "sliding_window": module.sliding_window or 0,
            "soft_cap": getattr(module.impl, "logits_soft_cap", None) or 0.0,
        }
