# SPDX-License-Identifier: Apache-2.0
"""vLLM attention metadata for forwards that we start ourselves.

A draft step is a decode of B rows with one token each; the calibration also times verify-shaped
steps with several tokens a row. The metadata that vLLM built for its own step is never modified.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from knapspec_vllm.draft.engine import Engine


def slots_of(
    # [B, num_blocks] int32
    block_table: torch.Tensor,
    # [B, q] int64
    positions: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Physical cache slots [B, q] int64 of the given positions."""
    blocks = block_table.gather(1, positions.div(block_size, rounding_mode="floor"))
    return blocks.long() * block_size + positions % block_size


class StepMetadata:
    """Builds per-layer metadata for uniform batches of B rows x q tokens."""

    def __init__(self, engine: Engine) -> None:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        self._engine = engine
        self._common = CommonAttentionMetadata
        # Optional fields differ between vLLM 0.26 and 0.33; only those that exist are passed.
        self._fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}

    def common(
        self,
        # [B, num_blocks] int32: the blocks attention reads
        block_table: torch.Tensor,
        # [B] int32 or int64: length each row attends to, its own q tokens included
        lengths: torch.Tensor,
        # [B * q] int64
        slots: torch.Tensor,
        # [B * q] int64
        positions: torch.Tensor,
        max_length: int,
        tokens_per_row: int = 1,
    ) -> Any:
        """vLLM's CommonAttentionMetadata over these tensors; int32 lengths are not copied.

        max_length: host-side upper bound of `lengths`.
        """
        rows = len(lengths)
        device = self._engine.device
        starts_cpu = torch.arange(rows + 1, dtype=torch.int32) * tokens_per_row
        values = dict(
            # Made there: a copy from pageable memory would wait for the device.
            query_start_loc=torch.arange(rows + 1, dtype=torch.int32, device=device)
            * tokens_per_row,
            query_start_loc_cpu=starts_cpu,
            seq_lens=lengths.int(),
            num_reqs=rows,
            num_actual_tokens=rows * tokens_per_row,
            max_query_len=tokens_per_row,
            max_seq_len=max_length,
            block_table_tensor=block_table,
            slot_mapping=slots,
            causal=True,
            positions=positions,
            is_prefilling=torch.zeros(rows, dtype=torch.bool),
            seq_lens_cpu_upper_bound=torch.full((rows,), max_length, dtype=torch.int32),
        )
        return self._common(**{k: v for k, v in values.items() if k in self._fields})

    def built(self, common: Any) -> dict[str, Any]:
        """What the attention backend makes of it, by layer name."""
        metadata: dict[str, Any] = {}
        for group in self._engine.attention_groups:
            built = _build(group, common, drafting=common.max_query_len == 1)
            metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata

    def build(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`built` of `common` of the arguments."""
        return self.built(self.common(*args, **kwargs))

    @contextmanager
    def active(
        self, metadata: dict[str, Any], slots: torch.Tensor, **context: Any
    ) -> Iterator[None]:
        """Forward context for one forward over the given metadata and slots [T] int64.

        context: of vLLM's own, where the forward replays its graphs.
        """
        from vllm.forward_context import set_forward_context

        slot_mapping = dict.fromkeys(self._engine.layer_names, slots)
        with set_forward_context(
            metadata,
            self._engine.vllm_config,
            num_tokens=len(slots),
            slot_mapping=slot_mapping,
            **context,
        ):
            yield


def _build(group: Any, common: Any, *, drafting: bool) -> Any:
    if hasattr(group, "build_metadata"):  # vLLM 0.28 on: the group maps manager to kernel blocks
        if drafting:
            return group.build_metadata_for_drafting(common, draft_index=1)
        return group.build_metadata(common)
    builder = group.get_metadata_builder()
    if drafting:
        return builder.build_for_drafting(common, draft_index=1)
    return builder.build(0, common)
