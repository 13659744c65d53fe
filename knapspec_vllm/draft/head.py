# SPDX-License-Identifier: Apache-2.0
"""From the draft's output states to its next tokens, without gathering a sharded vocabulary.

Under tensor parallelism a rank holds a slice of the head. Gathering the logits moves B x V numbers;
three numbers a row and rank say as much about the most likely token and its probability.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.screened_head import ScreenedHead, slice_of
from knapspec_vllm.models.view import SublayerView

HeadKind = Literal["full", "screened"]
"""The model's head, or `ScreenedHead`."""


class GreedyHead:
    """Most likely token of each row, the same on every tensor-parallel rank."""

    def __init__(self, view: SublayerView, confident: bool) -> None:
        """confident: whether anybody reads the probabilities; they may be 1.0 otherwise."""
        from vllm.distributed.parallel_state import get_tp_group

        #: Drafts instead of the model's head.
        self.screen: ScreenedHead | None = None
        self._view = view
        self._confident = confident
        self._group = get_tp_group()
        processor = getattr(view.target, "logits_processor", None)
        head = getattr(view.target, "lm_head", None)
        # vLLM before 0.32 cannot leave the gather out; then the whole vocabulary is looked at.
        self._sharded = (
            self._group.world_size > 1
            and hasattr(head, "shard_indices")
            and processor is not None
            and "skip_gather" in inspect.signature(processor.forward).parameters
        )

    @property
    def kind(self) -> HeadKind:
        return "full" if self.screen is None else "screened"

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [T, d] -> token ids [T] int64, their probabilities [T] float32."""
        if self.screen is not None:
            token_ids, maximum, total = self.screen.partials(hidden, self._confident)
            if self._group.world_size == 1:
                return token_ids, total.reciprocal()
            return self._merged(token_ids, maximum, total)
        if not self._sharded:
            return ops.greedy_confidence(self._view.logits(hidden), confident=self._confident)
        target: Any = self._view.target
        logits = target.logits_processor(target.lm_head, hidden, skip_gather=True)
        first, valid = slice_of(target.lm_head)
        return self._merged(*ops.greedy_partials(logits, first_token=first, valid=valid))

    def _merged(
        self, token_ids: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Ids below 2^24 are exact in float32; larger vocabularies do not exist.
        mine = torch.stack([token_ids.float(), maximum, total])[None]
        everyone = self._group.all_gather(mine, dim=0)
        return ops.merge_greedy(everyone[:, 0].long(), everyone[:, 1], everyone[:, 2])
