# SPDX-License-Identifier: Apache-2.0
"""Drafts tokens by running a plan's sublayers over the target's weights and paged KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.attention import (
    AttentionPath,
    BackendAttention,
    Cores,
    DraftAttention,
    KernelAttention,
)
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.head import GreedyHead
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.models.view import SublayerView
from knapspec_vllm.planner.types import Mode, Plan

Forward = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""One forward of the rows where they stand: token ids [B] int64, top-1 probability [B] float32."""


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
        self._attention: dict[AttentionPath, DraftAttention] = {
            "backend": BackendAttention(engine),
            "kernel": KernelAttention(engine, geometry),
        }
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
        with self.forwards(plan, state, max(rows.host_positions) + draft_length) as forward:
            for _ in range(draft_length):
                tokens, confidence = forward()
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

    @contextmanager
    def forwards(self, plan: Plan, state: ops.DraftState, longest: int) -> Iterator[Forward]:
        """The forward of a round, to be called for one token after another.

        longest: host-side upper bound of the rows' lengths in any of them.
        """
        view, attention = self._engine.view, self._attention[self.attention_path]
        with attention.round(plan, state, longest) as (core_of, refresh):

            def forward() -> tuple[torch.Tensor, torch.Tensor]:
                refresh()
                return self._head(run_plan(view, plan, state.tokens, state.positions, core_of))

            yield forward

    @property
    def _may_stop_early(self) -> bool:
        """Looking costs nothing on a CPU; a GPU would have to be waited for."""
        return self._threshold > 0 and self._engine.device.type == "cpu"


def run_plan(
    view: SublayerView,
    plan: Plan,
    # [T] int64
    token_ids: torch.Tensor,
    # [T] int64
    positions: torch.Tensor,
    core_of: Cores = lambda layer: None,
) -> torch.Tensor:
    """Output states [T, d] of the plan's sublayers; needs a forward context.

    core_of: attention core of a layer; None stands for vLLM's attention module.
    """
    delta, residual = None, view.embed(token_ids)
    for layer in range(view.num_layers):
        if plan.attention(layer) != Mode.SKIP:
            delta, residual = view.attention(layer, positions, delta, residual, core_of(layer))
        if plan.mlp(layer) != Mode.SKIP:
            delta, residual = view.mlp(layer, delta, residual)
    return view.final_hidden(delta, residual)
