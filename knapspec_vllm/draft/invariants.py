# SPDX-License-Identifier: Apache-2.0
"""The losslessness invariant, checked (setting `debug_invariants`).

Drafts may write K/V only into slots of positions that the next verify step recomputes: at or after
the newest token, inside blocks the request owns. All else in the cache must stay bit-identical.
"""

from __future__ import annotations

import torch

from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.metadata import slots_of
from knapspec_vllm.draft.rows import DraftRows


class InvariantError(AssertionError):
    """A draft touched K/V that later steps rely on."""


class InvariantGuard:
    """Compares the cache blocks of the drafting rows before and after a draft.

    All blocks that the rows list are copied, which costs time and memory; it is a debugging aid.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def before(self, rows: DraftRows, block_counts: list[int], draft_length: int) -> None:
        """Check the slots a draft of `draft_length` may write, and remember the cache.

        block_counts: blocks allocated to each row.
        """
        bs = self._engine.block_size
        self._rows, self._tables = rows, []
        seen: dict[int, int] = {}
        for i, count in enumerate(block_counts):
            blocks = rows.block_table[i, :count].tolist()
            last = rows.host_positions[i] + max(min(rows.limits[i], draft_length), 1) - 1
            if last >= count * bs or 0 in blocks:
                raise InvariantError(
                    f"request {rows.req_ids[i]}: position {last} has no allocated KV slot "
                    f"({count} blocks of {bs} tokens)"
                )
            for block in blocks[rows.host_positions[i] // bs :]:
                if seen.setdefault(block, i) != i:
                    raise InvariantError(f"requests share the writable KV block {block}")
            self._tables.append(blocks)
        self._blocks = torch.tensor(
            sorted({b for t in self._tables for b in t}), device=self._engine.device
        )
        self._copies = [self._read(i) for i in range(len(self._engine.layer_names))]
        self._values = [self._gather(i) for i in range(len(self._engine.paged_kv))]

    def after(self, drafts: list[list[int]]) -> None:
        """Raise InvariantError if any K/V outside the drafted positions changed."""
        bs = self._engine.block_size
        allowed = set()
        for i, draft in enumerate(drafts):
            if draft:
                positions = torch.arange(len(draft)) + self._rows.host_positions[i]
                table = self._rows.block_table[i : i + 1].cpu()
                allowed |= {s // bs for s in slots_of(table, positions[None], bs)[0].tolist()}
        for layer, copy in enumerate(self._copies):
            changed = (self._read(layer) != copy).flatten(1).any(dim=1)
            stray = set(self._blocks[changed].tolist()) - allowed
            if stray:
                raise InvariantError(
                    f"layer {layer}: drafting changed the KV blocks {sorted(stray)}"
                )
            self._check_tokens(layer, drafts)

    def _check_tokens(self, layer: int, drafts: list[list[int]]) -> None:
        """Inside the block that holds the newest token, earlier tokens must be untouched too."""
        if not self._values:
            return
        bs = self._engine.block_size
        now = self._gather(layer)
        order = {block: i for i, block in enumerate(self._blocks.tolist())}
        for i, draft in enumerate(drafts):
            offset = self._rows.host_positions[i] % bs
            if not draft or not offset:
                continue
            block = self._tables[i][self._rows.host_positions[i] // bs]
            span = slice(order[block] * bs, order[block] * bs + offset)
            pairs = zip(now, self._values[layer], strict=True)
            if not all(torch.equal(a[span], b[span]) for a, b in pairs):
                raise InvariantError(
                    f"layer {layer}: drafting for request {self._rows.req_ids[i]} changed K/V of "
                    f"verified tokens in block {block}"
                )

    def _gather(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the rows' blocks, each [blocks * block_size, heads, dim]."""
        return self._engine.paged_kv[layer].gather(self._blocks, self._engine.dtype)

    def _read(self, layer: int) -> torch.Tensor:
        """[blocks, ...] raw cache contents of the rows' blocks."""
        cache = self._engine.view.attention_layer(layer).kv_cache
        axis = next(a for a in range(cache.dim()) if cache.shape[a] == self._engine.num_blocks)
        return cache.index_select(axis, self._blocks).movedim(axis, 0).clone()
