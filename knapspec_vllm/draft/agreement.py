# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks act on rank 0's decisions.

Wall-clock measurements differ from rank to rank; a plan derived from them would too, and ranks that
run different sublayers wait for each other's collectives forever. So whatever depends on time is
decided on rank 0 and broadcast over the CPU group.
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class Agreement:
    """Broadcasts small picklable values from tensor-parallel rank 0; free of cost without TP."""

    def __init__(self) -> None:
        from vllm.distributed.parallel_state import get_tp_group

        self._group = get_tp_group()

    @property
    def leads(self) -> bool:
        return self._group.rank_in_group == 0

    @property
    def alone(self) -> bool:
        """Whether this rank may act on what only it has seen."""
        return self._group.world_size == 1

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank. All ranks must call it."""
        if self.alone:
            return value
        return self._group.broadcast_object(value, src=0)
