# SPDX-License-Identifier: Apache-2.0
"""Batch shapes that calibration measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from knapspec_vllm.draft.engine import Engine

_SHORT_CONTEXT = 192
_LONG_CONTEXT = 4096
_MOST_ROWS = 32
_MOST_ROWS_ON_GPU = 256
"""A verify step of a small batch reads weights, of a large one it computes, of which small ones
say nothing; servers with 80 GB admit 1,024 rows by default."""


@dataclass(frozen=True)
class Cell:
    """One batch shape: rows, and each row's context length in tokens."""

    rows: int
    context: int


def measured_rows(max_rows: int, device: torch.device) -> list[int]:
    """Batches that are measured of a server that admits so many rows, ascending."""
    rows = [1]
    most = _MOST_ROWS if device.type == "cpu" else _MOST_ROWS_ON_GPU
    while rows[-1] * 2 <= min(max_rows, most):
        rows.append(rows[-1] * 2)
    return rows


def cells_of(engine: Engine, num_speculative_tokens: int, max_rows: int) -> Iterator[Cell]:
    """Corners first, then the rows between them."""
    room = engine.max_model_len - num_speculative_tokens - 2
    cache_tokens = (engine.num_blocks - 1) * engine.block_size
    contexts = sorted({min(_SHORT_CONTEXT, room), min(_LONG_CONTEXT, room)})
    rows = measured_rows(max_rows, engine.device)
    # 1, 4, 2, 8, 16, 32: a batch of four tells more about the slope than a batch of two.
    rows.sort(key=lambda n: (n > 4, n != 1, n != 4, n))
    for count in rows:
        for context in contexts:
            if count * (context + num_speculative_tokens + 2) <= cache_tokens:
                yield Cell(count, context)
