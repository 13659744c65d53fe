# SPDX-License-Identifier: Apache-2.0
"""Drafts tokens by running a plan's sublayers over the target's weights and paged KV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.head import GreedyHead
from knapspec_vllm.draft.metadata import StepMetadata
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.models.view import AttentionCore, SublayerView
from knapspec_vllm.planner.types import Mode, Plan

AttentionPath = Literal["backend", "kernel"]
"""Who computes draft attention: vLLM's attention backend, or `ops.paged_decode_attention`."""


class Drafter:
    """Greedy drafts of differing lengths for the rows of one round.

    Proposals are the argmax of the draft's logits, a deterministic function of the prefix; vLLM's
    rejection sampler therefore treats the draft distribution as one-hot, and cutting a draft short
    at any point keeps the output distribution exact.
    """

    def __init__(
        self, engine: Engine, geometry: WindowGeometry, confidence_threshold: float
    ) -> None:
        self._engine = engine
        self._geometry = geometry
        self._threshold = confidence_threshold
        self._metadata = StepMetadata(engine)
        self._head = GreedyHead(engine.view)
        self.attention_path: AttentionPath = "backend"

    @torch.inference_mode()
    def draft(self, plan: Plan, draft_length: int, rows: DraftRows) -> list[list[int]]:
        """Up to `draft_length` tokens for each row, in the rows' order.

        A row stops at its limit, or after a token whose top-1 probability is under the confidence
        threshold (that token is still proposed: its forward has been paid for). Which rows go on
        is decided on the device; the host reads the result once, at the end.
        """
        draft_length = min(draft_length, max(rows.limits, default=0))
        if draft_length <= 0:
            return [[] for _ in range(len(rows))]
        state = self.start(plan, draft_length, rows)
        longest = max(rows.host_positions) + 1
        for step in range(draft_length):
            tokens, confidence = self.forward(plan, state, longest + step)
            ops.draft_advance(state, tokens, confidence, threshold=self._threshold)
            if self._may_stop_early and not state.active.any():
                break
        counts, *columns = torch.cat([state.counts[None].long(), state.drafts.T]).tolist()
        return [[column[i] for column in columns[:count]] for i, count in enumerate(counts)]

    def start(self, plan: Plan, draft_length: int, rows: DraftRows) -> ops.DraftState:
        """The rows' state before the first of `draft_length` forwards."""
        windowed = Mode.WINDOW in plan.modes
        state = ops.DraftState.allocate(
            len(rows),
            draft_length,
            rows.block_table,
            block_size=self._engine.block_size,
            max_model_len=self._engine.max_model_len,
            sink_blocks=self._geometry.sink_blocks,
            window_tokens=self._geometry.window_tokens if windowed else 0,
        )
        state.tokens.copy_(rows.tokens)
        state.positions.copy_(rows.positions)
        state.limits.copy_(ops.to_device(rows.limits, torch.int32, self._engine.device))
        ops.draft_start(state)
        return state

    def forward(
        self, plan: Plan, state: ops.DraftState, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward: token ids [B] int64, top-1 probability [B] float32.

        longest: host-side upper bound of the rows' lengths.
        """
        view = self._engine.view
        if self.attention_path == "kernel":
            with self._metadata.active({}, state.slots):
                hidden = run_plan(
                    view, plan, state.tokens, state.positions, self._cores(plan, state, longest)
                )
        else:
            metadata = self._step_metadata(plan, state, longest)
            with self._metadata.active(metadata, state.slots):
                hidden = run_plan(view, plan, state.tokens, state.positions)
        return self._head(hidden)

    @property
    def _may_stop_early(self) -> bool:
        """Looking costs nothing on a CPU; a GPU would have to be waited for."""
        return self._threshold > 0 and self._engine.device.type == "cpu"

    def _step_metadata(self, plan: Plan, state: ops.DraftState, longest: int) -> dict[str, Any]:
        """Of vLLM's attention backend, by layer name."""
        metadata: dict[str, Any] = {}
        if any(plan.attention(layer) == Mode.FULL for layer in range(plan.num_layers)):
            metadata = self._metadata.build(
                state.block_table, state.lengths, state.slots, state.positions, longest
            )
        if state.window_table is not None:
            windowed = self._metadata.build(
                state.window_table,
                state.window_lengths,
                state.slots,
                state.positions,
                min(longest, state.window_table.shape[1] * self._engine.block_size),
            )
            names = self._engine.layer_names
            metadata = {
                name: windowed[name] if plan.attention(layer) == Mode.WINDOW else metadata.get(name)
                for layer, name in enumerate(names)
            }
        return metadata

    def _cores(
        self, plan: Plan, state: ops.DraftState, longest: int
    ) -> Callable[[int], AttentionCore]:
        """Attention of each layer by our kernel, K/V written by vLLM's own writer."""
        engine, geometry, rows = self._engine, self._geometry, len(state.tokens)

        def core_of(layer: int) -> AttentionCore:
            module = engine.view.attention_layer(layer)
            options = geometry.attention_options(module, plan.attention(layer) == Mode.WINDOW)

            def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
                key, value = (x.view(rows, -1, module.head_size) for x in (key, value))
                module.impl.do_kv_cache_update(module, key, value, module.kv_cache, state.slots)
                return ops.paged_decode_attention(
                    query.view(rows, -1, module.head_size),
                    engine.paged_kv[layer],
                    state.block_table,
                    state.lengths,
                    max_length=longest,
                    **options,
                ).view(rows, -1)

            return core

        return core_of


def run_plan(
    view: SublayerView,
    plan: Plan,
    # [T] int64
    token_ids: torch.Tensor,
    # [T] int64
    positions: torch.Tensor,
    core_of: Callable[[int], AttentionCore] | None = None,
) -> torch.Tensor:
    """Output states [T, d] of the plan's sublayers; needs a forward context.

    core_of: attention core of a layer instead of vLLM's backend.
    """
    delta, residual = None, view.embed(token_ids)
    for layer in range(view.num_layers):
        if plan.attention(layer) != Mode.SKIP:
            core = None if core_of is None else core_of(layer)
            delta, residual = view.attention(layer, positions, delta, residual, core)
        if plan.mlp(layer) != Mode.SKIP:
            delta, residual = view.mlp(layer, delta, residual)
    return view.final_hidden(delta, residual)
