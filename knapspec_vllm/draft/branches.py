# SPDX-License-Identifier: Apache-2.0
"""The solver's view of the served model: many candidate branches over a few reference tokens.

Reference tokens are the newest R tokens of up to S rows, R * S in all, packed row after row. A
branch is one candidate path through the layers; its tokens attend to the row's shared paged prefix
(K/V that the target computed, read from the cache once for all branches) and to the branch's own
earlier reference tokens. Nothing is written to the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.windows import WindowGeometry

#: Rows of logits computed at once: 512 x 49,152 float32 are 100 MB, 128 keep it at 25 MB.
_LOGIT_ROWS = 128


@dataclass(frozen=True)
class ReferenceRow:
    """R committed tokens at positions start..start+R-1 whose prefix 0..start-1 is in the cache."""

    #: [R] int64, on the device
    tokens: torch.Tensor
    start: int
    #: [ceil(start / block_size)] int64, on the device
    blocks: torch.Tensor


class VllmBranches:
    """`planner.solver.BranchRunner` over a served vLLM model."""

    def __init__(
        self,
        engine: Engine,
        geometry: WindowGeometry,
        rows: list[ReferenceRow],
    ) -> None:
        self._engine = engine
        self._view = engine.view
        self._layouts = engine.layouts
        self._geometry = geometry
        self._rows = rows
        self.num_layers = engine.view.num_layers
        self._tokens = torch.cat([row.tokens for row in rows])
        self._positions = torch.cat(
            [torch.arange(len(row.tokens), device=row.tokens.device) + row.start for row in rows]
        )

    def reference_states(self) -> torch.Tensor:
        """[R, d] residual stream after the embedding."""
        return self._view.embed(self._tokens)

    def attention(
        self, layer: int, states: torch.Tensor, window: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N, R, d] -> streams after FULL and, if asked, WINDOW attention, each [N, R, d]."""
        num, refs, width = states.shape
        flat = states.reshape(num * refs, width)
        module = self._view.attention_layer(layer)
        name = module.layer_name

        def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query = query.view(num, refs, -1, module.head_size)
            key = key.view(num, refs, -1, module.head_size)
            value = value.view(num, refs, -1, module.head_size)
            full = torch.empty_like(query)
            windowed = torch.empty_like(query) if window else None
            at = 0
            for row in self._rows:
                span = slice(at, at + len(row.tokens))
                at = span.stop
                prefix = self._layouts[name].read(module, row.blocks, row.start, query.dtype)
                tail = key[:, span], value[:, span]
                scale = module.impl.scale
                mask = self._sliding_mask(module, row)
                full[:, span] = ops.branch_attention(query[:, span], *prefix, *tail, scale, mask)
                if windowed is not None:
                    kept = self._kept(row)
                    windowed[:, span] = ops.branch_attention(
                        query[:, span], prefix[0][kept], prefix[1][kept], *tail, scale
                    )
            parts = [full] if windowed is None else [full, windowed]
            return torch.cat([part.reshape(num * refs, -1) for part in parts])

        positions = self._positions.repeat(num)
        delta = self._view.attention_with(layer, positions, flat, core)
        full = (flat + delta[: num * refs]).view(states.shape)
        if not window:
            return full, None
        return full, (flat + delta[num * refs :]).view(states.shape)

    def mlp(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """[N, R, d] -> [N, R, d]."""
        flat = states.reshape(-1, states.shape[-1])
        delta, _ = self._view.mlp(layer, None, flat)
        return (flat + delta).view(states.shape)

    def top1(self, states: torch.Tensor) -> torch.Tensor:
        """Argmax tokens [N, R] int64 of the head over states [N, R, d]."""
        flat = states.reshape(-1, states.shape[-1])
        tokens = [
            self._view.logits(self._view.final_hidden(None, part)).argmax(dim=-1)
            for part in flat.split(_LOGIT_ROWS)
        ]
        return torch.cat(tokens).view(states.shape[:-1])

    def _sliding_mask(self, module: Any, row: ReferenceRow) -> torch.Tensor | None:
        """Visible prefix [R, start] under sliding-window attention; None for all of it."""
        window = getattr(module, "sliding_window", None)
        if window is None:
            return None
        # vLLM counts the token itself: token p sees p - window + 1 ... p.
        offsets = torch.arange(len(row.tokens), device=row.tokens.device) + row.start
        return torch.arange(row.start, device=row.tokens.device) > offsets[:, None] - window

    def _kept(self, row: ReferenceRow) -> torch.Tensor:
        """Indices of the prefix tokens that WINDOW attention reads at the row's last token."""
        geometry = self._geometry
        sinks = min(geometry.sink_blocks * geometry.block_size, row.start)
        first = geometry.first_block(row.start + len(row.tokens)) * geometry.block_size
        device = row.tokens.device
        return torch.cat(
            [
                torch.arange(sinks, device=device),
                torch.arange(min(max(first, sinks), row.start), row.start, device=device),
            ]
        )
