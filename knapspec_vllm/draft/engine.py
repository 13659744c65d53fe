# SPDX-License-Identifier: Apache-2.0
"""What the drafter needs to know of the engine, and nothing of which vLLM runner it came from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from knapspec_vllm import ops
from knapspec_vllm.models.view import SublayerView

if TYPE_CHECKING:
    from knapspec_vllm.draft.target import Target


@dataclass(frozen=True)
class Engine:
    """One worker's engine as the drafter, the branch runner and the calibration see it.

    block_size is in tokens and matches the block tables handed to the drafter; num_blocks is how
    many such blocks the KV cache has (block 0 is vLLM's null block).
    """

    vllm_config: Any
    view: SublayerView
    target: Target
    #: vLLM AttentionGroups over all layers, with metadata builders of our own.
    attention_groups: tuple[Any, ...]
    layer_names: tuple[str, ...]
    device: torch.device
    block_size: int
    num_blocks: int
    max_model_len: int
    #: K and V of every layer, in layer order; empty where the backend's layout is unknown.
    paged_kv: tuple[ops.PagedKV, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.vllm_config.model_config.dtype

    def most_drafts(self, rows: int) -> int:
        """See the function."""
        return most_drafts(self.vllm_config.scheduler_config, rows)

    @property
    def runs_ahead(self) -> bool:
        """Whether the host queues work for a device without waiting for what it queued before."""
        return self.device.type != "cpu" and self.vllm_config.scheduler_config.async_scheduling

    def synchronize(self) -> None:
        """Wait for the device; a no-op on a CPU."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def most_drafts(scheduler_config: Any, rows: int) -> int:
    """Drafted tokens of each of `rows` rows that a step has room to verify. vLLM spends a step's
    budget row by row: of more, the last rows would stand still until others end. Half of it is left
    to prompts, which are often the last."""
    budget = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    return max(0, int(budget) // (2 * rows) - 1)


def own_attention_groups(
    groups: list[Any], vllm_config: Any, device: torch.device
) -> tuple[Any, ...]:
    """Copies of vLLM's AttentionGroups with builders of their own.

    Some builders keep persistent buffers that the target's captured graphs read, so sharing them
    between the target's and the draft's metadata would corrupt one of the two.
    """
    from vllm.config import set_current_vllm_config

    own = []
    with set_current_vllm_config(vllm_config):
        for group in groups:
            block_size = group.get_metadata_builder().kv_cache_spec.block_size
            group = copy.copy(group)
            group.metadata_builders = []
            group.create_metadata_builders(vllm_config, device, block_size)
            own.append(group)
    return tuple(own)
