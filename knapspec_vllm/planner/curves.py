# SPDX-License-Identifier: Apache-2.0
"""Measured time as a function of (rows, context): one curve, fitted without ever going negative.

At each measured number of rows r a curve is `base(r) + slope(r) * context_tokens`. Between
measured rows both `base` and the cost of one more context token per row, `r * slope(r)`, are
interpolated linearly, and both are made non-decreasing in r (isotonic regression), so noise can
never make a larger batch of equally long rows look cheaper. Beyond the measured rows a token of
context keeps its price, as there the cache is read at the memory's speed: 256 rows of 4,000 tokens
read four times what 64 do.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

MAX_ROWS_EXTRAPOLATION = 2.0
"""Beyond the largest measured batch a curve continues its last slope up to this factor."""


@dataclass(frozen=True)
class Curve:
    """Time in microseconds over (rows, context); all three tuples have one entry per grid point."""

    rows: tuple[int, ...]
    base_us: tuple[float, ...]
    per_row_token_us: tuple[float, ...]
    """Cost of one more context token in every row: rows * slope."""

    def __post_init__(self) -> None:
        lengths = {len(self.rows), len(self.base_us), len(self.per_row_token_us)}
        if lengths != {len(self.rows)} or not self.rows:
            raise ValueError("a curve needs equally many rows, bases and slopes, at least one")
        if self.rows[0] < 1 or any(a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError(f"a curve's rows must ascend from 1, got {self.rows}")
        for values in (self.base_us, self.per_row_token_us):
            if any(not math.isfinite(value) or value < 0 for value in values):
                raise ValueError("a curve's times must be finite and not negative")

    @classmethod
    def guarded(
        cls, rows: Sequence[int], base_us: Sequence[float], per_row_token_us: Sequence[float]
    ) -> Curve:
        """A curve from noisy values: clipped at 0 and made non-decreasing in rows."""
        return cls(
            tuple(rows),
            tuple(isotonic([max(value, 0.0) for value in base_us])),
            tuple(isotonic([max(value, 0.0) for value in per_row_token_us])),
        )

    @property
    def limit(self) -> float:
        """Rows up to which the last slopes hold; a single point has none."""
        return self.rows[-1] * (MAX_ROWS_EXTRAPOLATION if len(self.rows) > 1 else 1.0)

    def at(self, rows: int, context_tokens: float) -> float:
        """Time of a batch, microseconds. Below the smallest measured rows: the value there."""
        clamped = min(max(float(rows), self.rows[0]), self.limit)
        low, weight = self._segment(clamped)
        base = _lerp(self.base_us, low, weight)
        token = _lerp(self.per_row_token_us, low, weight) / min(rows, self.limit)
        return base + token * context_tokens

    def _segment(self, rows: float) -> tuple[int, float]:
        if len(self.rows) == 1:
            return 0, 0.0
        low = min(max(bisect_left(self.rows, rows) - 1, 0), len(self.rows) - 2)
        return low, (rows - self.rows[low]) / (self.rows[low + 1] - self.rows[low])


def _lerp(values: tuple[float, ...], low: int, weight: float) -> float:
    if len(values) == 1:
        return values[0]
    return values[low] + weight * (values[low + 1] - values[low])


def isotonic(values: Iterable[float]) -> list[float]:
    """Closest non-decreasing sequence in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            previous, count = blocks.pop()
            mean, size = (previous * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


def nonnegative_least_squares(
    equations: Sequence[Sequence[float]], targets: Sequence[float]
) -> list[float]:
    """Minimises the squared relative residuals over x >= 0, exactly, for a handful of unknowns.

    equations: one row of coefficients per measurement; targets: the measured times, all > 0.
    Tries every support set, so keep it at 6 unknowns or fewer. Directions that no measurement
    determines get the solution of least norm.
    """
    weights = 1.0 / torch.tensor(targets, dtype=torch.float64)
    matrix = torch.tensor(equations, dtype=torch.float64) * weights[:, None]
    ones = torch.ones(len(targets), 1, dtype=torch.float64)
    unknowns = matrix.shape[1]
    scale = matrix.abs().amax(dim=0).clamp_min(1e-300)  # columns of one size: well conditioned
    matrix = matrix / scale
    best, best_residual = [0.0] * unknowns, float(len(targets))
    for size in range(1, unknowns + 1):
        for support in combinations(range(unknowns), size):
            columns = matrix[:, list(support)]
            found = torch.linalg.lstsq(columns, ones, driver="gelsd").solution
            residual = float((columns @ found - ones).square().sum())
            if float(found.min()) < 0 or residual >= best_residual - 1e-12:
                continue
            best, best_residual = [0.0] * unknowns, residual
            for index, value in zip(support, found[:, 0].tolist(), strict=True):
                best[index] = value / float(scale[index])
    return best


def median(values: Iterable[float]) -> float:
    """Middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
