# SPDX-License-Identifier: Apache-2.0
"""The committed tokens on which the solver judges plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from knapspec_vllm import ops
from knapspec_vllm.config import KnapSpecConfig
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


@dataclass(frozen=True)
class Wanted:
    """How many tokens plans are judged on, and of which rows."""

    number: int
    """Over all rows."""
    most_rows: int
    least_tokens: int
    """Of a row."""
    latest_start: int
    """Position."""

    @classmethod
    def of(
        cls, config: KnapSpecConfig, number: int, device_type: str, max_model_len: int
    ) -> Wanted:
        latest = _CPU_CONTEXT if device_type == "cpu" else max_model_len
        return cls(number, config.reference_rows, config.reference_tokens, latest)


@dataclass(frozen=True)
class Passages:
    """The tokens of `References` on the host, as many of each row."""

    req_ids: tuple[str, ...]
    starts: tuple[int, ...]
    #: Row after row.
    tokens: tuple[int, ...]

    def on_device(
        self,
        engine: Engine,
        # requests -> rows of the runner's batch
        places: Mapping[str, int],
        # [rows of the runner's batch, num_blocks] int32, on the device
        block_table: torch.Tensor,
    ) -> References | None:
        """None where the layout of the KV cache is unknown."""
        if not engine.paged_kv:
            return None
        width = max(1, -(-max(self.starts) // engine.block_size))
        index = [places[req_id] for req_id in self.req_ids]
        return References(
            tokens=ops.to_device(list(self.tokens), torch.int64, engine.device),
            starts=ops.to_device(list(self.starts), torch.int64, engine.device),
            block_table=block_table[ops.to_device(index, torch.int64, engine.device), :width],
            max_start=max(self.starts),
        )


def newest_passages(
    rows: Candidates,
    # place among these rows, first and end position
    known_tokens: Callable[[int, int, int], Sequence[int]],
    wanted: Wanted,
) -> Passages | None:
    """The newest tokens of the longest rows; None while no row is long enough.

    Where fewer than `most_rows` rows are at hand, each gives more, because what a solve learns
    grows with the tokens and not with the rows.
    """
    order = sorted(range(len(rows.req_ids)), key=lambda i: (-rows.positions[i], i))
    order = [i for i in order if rows.positions[i] + 1 >= wanted.least_tokens]
    order = order[: wanted.most_rows]
    if not order:
        return None
    count = min(wanted.number // len(order), rows.positions[order[-1]] + 1)
    starts = [min(rows.positions[i] + 1 - count, wanted.latest_start) for i in order]
    tokens: list[int] = []
    for i, start in zip(order, starts, strict=True):
        tokens += known_tokens(i, start, start + count)
    return Passages(tuple(rows.req_ids[i] for i in order), tuple(starts), tuple(tokens))
