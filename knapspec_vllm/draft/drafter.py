# SPDX-License-Identifier: Apache-2.0
"""Drafts tokens by running a plan's sublayers over the target's weights and paged KV."""

from __future__ import annotations

from typing import Any

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.metadata import StepMetadata, slots_of
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.draft.windows import WindowGeometry, WindowTables, window_tables
from knapspec_vllm.models.view import SublayerView
from knapspec_vllm.planner.types import Mode, Plan


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

    @torch.inference_mode()
    def draft(self, plan: Plan, draft_length: int, rows: DraftRows) -> list[list[int]]:
        """Up to `draft_length` tokens for each row, in the rows' order.

        A row stops at its limit, or after a token whose top-1 probability is under the confidence
        threshold (that token is still proposed: its forward has been paid for).
        """
        drafts: list[list[int]] = [[] for _ in range(len(rows))]
        alive = [i for i, limit in enumerate(rows.limits) if min(limit, draft_length) > 0]
        if not alive:
            return drafts
        batch = rows.select(alive)
        windows = self.windows(plan, batch, draft_length)
        for step in range(draft_length):
            tokens, confidence = self.forward(plan, batch, windows, step)
            host_tokens, host_confidence = tokens.tolist(), confidence.tolist()
            keep = []
            for i, row in enumerate(alive):
                drafts[row].append(host_tokens[i])
                if step + 1 < min(batch.limits[i], draft_length) and (
                    host_confidence[i] >= self._threshold
                ):
                    keep.append(i)
            if not keep:
                break
            batch.tokens = tokens
            if len(keep) < len(alive):
                batch = batch.select(keep)
                alive = [alive[i] for i in keep]
                windows = self.windows(plan, batch, draft_length)
        return drafts

    def windows(self, plan: Plan, batch: DraftRows, draft_length: int) -> WindowTables | None:
        """Window tables for a round of up to `draft_length` forwards; None if no item is WINDOW."""
        if Mode.WINDOW not in plan.modes:
            return None
        return window_tables(self._geometry, batch.block_table, batch.positions, draft_length)

    def forward(
        self, plan: Plan, batch: DraftRows, windows: WindowTables | None, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward number `step` of a round: token ids [B] int64, top-1 probability [B] float32."""
        positions = batch.positions + step
        slots = slots_of(batch.block_table, positions[:, None], self._engine.block_size)[:, 0]
        longest = max(batch.host_positions) + step + 1
        metadata = self._step_metadata(plan, batch, windows, positions, slots, longest)
        with self._metadata.active(metadata, slots):
            hidden = run_plan(self._engine.view, plan, batch.tokens, positions)
        return ops.greedy_confidence(self._engine.view.logits(hidden))

    def _step_metadata(
        self,
        plan: Plan,
        batch: DraftRows,
        windows: WindowTables | None,
        positions: torch.Tensor,
        slots: torch.Tensor,
        longest: int,
    ) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if any(plan.attention(layer) == Mode.FULL for layer in range(plan.num_layers)):
            metadata = self._metadata.build(
                batch.block_table, positions + 1, slots, positions, longest
            )
        if windows is not None:
            windowed = self._metadata.build(
                windows.block_table,
                positions + 1 - windows.dropped,
                slots,
                positions,
                min(longest, windows.block_table.shape[1] * self._engine.block_size),
            )
            names = self._engine.layer_names
            metadata = {
                name: windowed[name] if plan.attention(layer) == Mode.WINDOW else metadata.get(name)
                for layer, name in enumerate(names)
            }
        return metadata


def run_plan(
    view: SublayerView,
    plan: Plan,
    # [T] int64
    token_ids: torch.Tensor,
    # [T] int64
    positions: torch.Tensor,
) -> torch.Tensor:
    """Output states [T, d] of the plan's sublayers; needs a forward context."""
    delta, residual = None, view.embed(token_ids)
    for layer in range(view.num_layers):
        if plan.attention(layer) != Mode.SKIP:
            delta, residual = view.attention(layer, positions, delta, residual)
        if plan.mlp(layer) != Mode.SKIP:
            delta, residual = view.mlp(layer, delta, residual)
    return view.final_hidden(delta, residual)
