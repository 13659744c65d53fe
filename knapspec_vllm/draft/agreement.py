# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks act on rank 0's decisions, and notice when they saw something else.

Wall-clock measurements differ from rank to rank; a plan derived from them would too, and ranks that
run different sublayers wait for each other's collectives forever. So whatever depends on time is
decided on rank 0 and broadcast over the CPU group. What every rank derives for itself (the batch,
what it drafted before) goes along, and a rank that has something else counts a mismatch.
"""

from __future__ import annotations

import logging
from typing import TypeVar

import torch

logger = logging.getLogger("vllm.knapspec")

T = TypeVar("T")

_REPORT_EVERY = 32
"""Broadcasts after which ranks add up their mismatches: one more collective of 8 bytes in 32."""


class Agreement:
    """Broadcasts small picklable values from tensor-parallel rank 0; free of cost without TP."""

    def __init__(self) -> None:
        from vllm.distributed.parallel_state import get_tp_group

        self._group = get_tp_group()
        #: Of all ranks, as last added up.
        self.mismatches = 0
        self._own_mismatches = 0
        self._shared = 0

    @property
    def leads(self) -> bool:
        return self._group.rank_in_group == 0

    @property
    def alone(self) -> bool:
        """Whether this rank may act on what only it has seen."""
        return self._group.world_size == 1

    def share(self, value: T, seen: object = None) -> T:
        """Rank 0's value, on every rank. All ranks must call it.

        seen: what this rank decides or acts on, comparable and picklable; should be rank 0's.
        """
        if self.alone:
            return value
        value, seen_by_first = self._group.broadcast_object((value, seen), src=0)
        if seen != seen_by_first:
            self._own_mismatches += 1
            if self._own_mismatches == 1:
                logger.error(
                    "KnapSpec on tensor-parallel rank %d saw %r where rank 0 saw %r; it follows "
                    "rank 0. Please report this; KNAPSPEC_DISABLE=1 serves without KnapSpec",
                    self._group.rank_in_group, seen, seen_by_first,
                )  # fmt: skip
        self._shared += 1
        if self._shared % _REPORT_EVERY == 0:
            total = torch.tensor([self._own_mismatches], device="cpu")
            torch.distributed.all_reduce(total, group=self._group.cpu_group)
            self.mismatches = int(total)
        return value
