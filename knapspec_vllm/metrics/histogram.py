# SPDX-License-Identifier: Apache-2.0
"""A histogram kept as plain numbers."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Histogram:
    """Counts of values by upper bound (inclusive, as Prometheus has it), and their sum."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the bounds are the reader's to know."""
        return {"counts": list(self.counts), "sum": self.sum}
