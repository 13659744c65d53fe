# SPDX-License-Identifier: Apache-2.0
"""A solve under way: the wait for its one asynchronous copy, and the plans that it found."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from knapspec_vllm.planner.selection import pareto
from knapspec_vllm.planner.types import Mode, Plan, PlanEstimate


class PendingSolve:
    """A solve under way on the device, from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self._started = time.perf_counter()
        self._on_device = device.type != "cpu"
        self._begins = self._mark(device)
        self._arrived: torch.Event | None = None

    def fetch(self, packed: Tensor, trials: int, bins: int) -> None:
        """Queue the copy of run_solver's result to the host. trials: reference tokens."""
        self._trials, self._bins = trials, bins
        self._packed = packed
        if self._on_device:
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = self._mark(packed.device)
        self._queued = time.perf_counter()

    def _mark(self, device: torch.device) -> torch.Event | None:
        if not self._on_device:
            return None
        event = torch.Event(device.type, enable_timing=True)
        event.record()
        return event

    def ready(self) -> bool:
        """Whether result() would not wait."""
        return self._arrived is None or self._arrived.query()

    @property
    def host_us(self) -> float:
        """What the host had to do with it: all of it on a CPU."""
        return (self._queued - self._started) * 1e6

    @property
    def time_us(self) -> float:
        """What it took; once it is ready."""
        if self._begins is None or self._arrived is None:
            return self.host_us
        return max(self.host_us, 1e3 * self._begins.elapsed_time(self._arrived))

    def result(self) -> tuple[PlanEstimate, ...]:
        """The frontier's plans, backtracked on the host; see `solve`."""
        if self._arrived is not None:
            self._arrived.synchronize()
        floats = self._packed[:2].view(torch.float32)
        saved, error = floats.tolist()
        hits, alive, *pointers = self._packed[2:].tolist()
        parents, modes = pointers[: len(pointers) // 2], pointers[len(pointers) // 2 :]
        found: dict[Plan, tuple[float, PlanEstimate]] = {}
        for branch in range(1, len(alive)):
            if not alive[branch]:
                continue
            plan = Plan(_backtrack(parents, modes, branch))
            cosine = max(1.0 - error[branch], -1.0)
            if not plan.is_full:
                estimate = PlanEstimate(plan, cosine, hits[branch], self._trials)
                found.setdefault(plan, (saved[branch], estimate))
        return pareto(list(found.values()), self._bins)


def _backtrack(parents: list[list[int]], modes: list[list[int]], branch: int) -> tuple[Mode, ...]:
    path = []
    for parent_row, mode_row in zip(reversed(parents), reversed(modes), strict=True):
        path.append(Mode(mode_row[branch]))
        branch = parent_row[branch]
    return tuple(reversed(path))
