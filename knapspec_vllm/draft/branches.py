# SPDX-License-Identifier: Apache-2.0
"""The solver's view of the served model: many candidate branches over a few reference tokens.

Reference tokens are the newest R tokens of each of S rows, packed row after row. A branch is one
candidate path through the layers; its tokens attend to the row's shared paged prefix (K/V that the
target computed, read from the cache once for all branches) and to the branch's own earlier
reference tokens. Nothing is written to the cache, and nothing waits for the device.
"""

from __future__ import annotations

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.references import References
from knapspec_vllm.draft.windows import WindowGeometry

#: Rows of logits computed at once: 512 x 49,152 float32 are 100 MB, 128 keep it at 25 MB.
LOGIT_ROWS = 128


class VllmBranches:
    """`planner.solver.BranchRunner` over a served vLLM model."""

    def __init__(self, engine: Engine, geometry: WindowGeometry, references: References) -> None:
        self._view = engine.view
        self._paged_kv = engine.paged_kv
        self._geometry = geometry
        self._references = references
        self._positions = references.positions
        self.num_layers = engine.view.num_layers

    def reference_states(self) -> torch.Tensor:
        """[T, d] residual stream after the embedding."""
        return self._view.embed(self._references.tokens)

    def attention(
        self, layer: int, states: torch.Tensor, window: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N, T, d] -> streams after FULL and, if asked, WINDOW attention, each [N, T, d]."""
        num, tokens, width = states.shape
        flat = states.reshape(num * tokens, width)
        module = self._view.attention_layer(layer)
        geometry = self._geometry

        def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            def attend(windowed: bool) -> torch.Tensor:
                return ops.branch_attention(
                    query.view(num, tokens, -1, module.head_size),
                    self._paged_kv[layer],
                    self._references.block_table,
                    self._references.starts,
                    key.view(num, tokens, -1, module.head_size),
                    value.view(num, tokens, -1, module.head_size),
                    max_prefix=self._references.max_start,
                    **geometry.attention_options(module, windowed),
                ).view(num * tokens, -1)

            full = attend(False)
            if not window:
                return full
            return torch.cat([full, attend(True)])

        delta, _ = self._view.attention(layer, self._positions.repeat(num), None, flat, core)
        full = (flat + delta[: num * tokens]).view(states.shape)
        if not window:
            return full, None
        return full, (flat + delta[num * tokens :]).view(states.shape)

    def mlp(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """[N, T, d] -> [N, T, d]."""
        flat = states.reshape(-1, states.shape[-1])
        delta, _ = self._view.mlp(layer, None, flat)
        return (flat + delta).view(states.shape)

    def top1(self, states: torch.Tensor) -> torch.Tensor:
        """Argmax tokens [N, T] int64 of the head over states [N, T, d]."""
        flat = states.reshape(-1, states.shape[-1])
        tokens = [
            # Not argmax, which takes three times as long on a CPU: a sixth of the solve.
            self._view.logits(self._view.final_hidden(None, part)).max(dim=-1).indices
            for part in flat.split(LOGIT_ROWS)
        ]
        return torch.cat(tokens).view(states.shape[:-1])
