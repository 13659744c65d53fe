# SPDX-License-Identifier: Apache-2.0
"""The committed tokens on which the solver judges plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.rows import Candidates

_CPU_CONTEXT = 2048
"""On a CPU references are taken no further into a row than this. Every branch reads the context of
its references, and everybody waits: 0.6 s at 200 tokens, 1.5 s at 2,000, and 4 s at 6,000 (SmolLM2,
two cores). Plans transfer within a text, and verification corrects what is believed of them."""


@dataclass(frozen=True)
class References:
    """R committed tokens of each of S rows, at positions starts[s] .. starts[s] + R - 1.

    The K and V of a row's positions before starts[s] are in the cache. All tensors are on the
    device.
    """

    # [S * R] int64, row after row
    tokens: torch.Tensor
    # [S] int64
    starts: torch.Tensor
    # [S, W] int32, W * block_size >= max_start
    block_table: torch.Tensor
    #: Largest of `starts`, on the host: sizes grids, decides nothing.
    max_start: int

    @property
    def positions(self) -> torch.Tensor:
        """[S * R] int64."""
        per_row = len(self.tokens) // len(self.starts)
        offsets = torch.arange(per_row, device=self.starts.device)
        return (self.starts[:, None] + offsets).flatten()


def newest_references(
    engine: Engine,
    rows: Candidates,
    # [rows of the runner's batch, max_model_len], on the host
    known_tokens: Any,
    # [rows of the runner's batch, num_blocks] int32, on the device
    block_table: torch.Tensor,
    number: int,
    most_rows: int,
    least_tokens: int,
) -> References | None:
    """The newest tokens of the longest rows; None while no row is long enough.

    In all `number`: where fewer than `most_rows` rows are at hand, each gives more, because what a
    solve learns grows with the tokens and not with the rows. least_tokens: of a row.
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows.positions[i], i))
    order = [i for i in order if rows.positions[i] + 1 >= least_tokens][:most_rows]
    if not order or not engine.paged_kv:
        return None
    most = _CPU_CONTEXT if engine.device.type == "cpu" else engine.max_model_len
    count = min(number // len(order), rows.positions[order[-1]] + 1)
    starts = [min(rows.positions[i] + 1 - count, most) for i in order]
    where = [rows.index[i] for i in order]
    tokens: list[int] = []
    for row, start in zip(where, starts, strict=True):
        tokens += known_tokens[row, start : start + count].tolist()
    width = max(1, -(-max(starts) // engine.block_size))
    return References(
        tokens=ops.to_device(tokens, torch.int64, engine.device),
        starts=ops.to_device(starts, torch.int64, engine.device),
        block_table=block_table[ops.to_device(where, torch.int64, engine.device), :width],
        max_start=max(starts),
    )
