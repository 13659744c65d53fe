# SPDX-License-Identifier: Apache-2.0
"""Turns cost samples into curves: least squares per measured batch size, then a monotone guard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from knapspec_vllm.planner.curves import Curve, median, nonnegative_least_squares

DISTINCT_CONTEXTS = 1.2
"""Contexts closer than this factor do not determine a slope."""

Points = dict[int, list[tuple[int, float]]]
"""rows -> [(context_tokens, time_us)]"""
DraftPoints = dict[int, list[tuple[str, int, float]]]
"""rows -> [(kind, context_tokens, time_us)]"""


def fit_step(points: Points) -> Curve:
    """Curve of a target step with one number of tokens per row."""
    slopes: dict[int, float] = {}
    bases: dict[int, float] = {}
    for rows, cells in points.items():
        if _determines_slope([context for context, _ in cells]):
            equations = [[1.0, float(context)] for context, _ in cells]
            found = nonnegative_least_squares(equations, [time_us for _, time_us in cells])
            bases[rows], slopes[rows] = found
    for rows in points.keys() - bases.keys():
        slope = _nearest(rows, slopes)
        bases[rows] = median(max(time_us - slope * c, 0.0) for c, time_us in points[rows])
        slopes[rows] = slope
    grid = sorted(points)
    return Curve.guarded(grid, [bases[r] for r in grid], [r * slopes[r] for r in grid])


def fit_drafts(drafts: DraftPoints, layers: int, window: int) -> tuple[Curve, Curve, Curve, Curve]:
    """Curves (fixed, attention, attention_window, mlp); the items per layer.

    window: tokens of a row that a WINDOW attention reads. Raises ValueError when the samples do
    not tell the parts of a draft apart.
    """
    usable = {}
    for rows, cells in drafts.items():
        kinds = {kind for kind, _, _ in cells} - {"draft_window"}
        if "draft_full" in kinds and len(kinds) >= 3:
            usable[rows] = cells
    if not usable:
        raise ValueError(
            "draft samples are needed at one number of rows for draft_full and two of "
            "draft_no_attention, draft_no_mlp and draft_empty"
        )
    slopes: dict[int, float] = {}
    found: dict[int, list[float]] = {}
    for rows, cells in usable.items():
        contexts = [c for kind, c, _ in cells if kind in ("draft_full", "draft_no_mlp")]
        if _determines_slope(contexts):
            found[rows] = _solve_drafts(rows, cells, layers, window, None)
            slopes[rows] = found[rows][4]
    for rows in usable.keys() - found.keys():
        found[rows] = _solve_drafts(rows, usable[rows], layers, window, _nearest(rows, slopes))
    grid = sorted(found)
    slope = [rows * found[rows][4] for rows in grid]
    flat = [0.0] * len(grid)
    return (
        Curve.guarded(grid, [found[r][0] for r in grid], flat),
        Curve.guarded(grid, [found[r][1] for r in grid], slope),
        Curve.guarded(grid, [found[r][2] for r in grid], slope),
        Curve.guarded(grid, [found[r][3] for r in grid], flat),
    )


def _nearest(rows: int, slopes: Mapping[int, float]) -> float:
    """Slope of the measured number of rows closest in ratio; 0 when none was determined."""
    if not slopes:
        return 0.0
    return slopes[min(slopes, key=lambda known: (abs(math.log(known / rows)), known))]


def _determines_slope(contexts: Sequence[int]) -> bool:
    return max(contexts) > DISTINCT_CONTEXTS * max(min(contexts), 1)


def _solve_drafts(
    rows: int,
    cells: Sequence[tuple[str, int, float]],
    layers: int,
    window: int,
    slope: float | None,
) -> list[float]:
    """[fixed, attention base, window base, MLP, attention slope] of one number of rows.

    slope: attention's cost per context token where the samples do not determine it.
    """
    equations, targets = [], []
    for kind, context, time_us in cells:
        windowed = kind == "draft_window"
        attends = kind in ("draft_full", "draft_no_mlp", "draft_window")
        read = (min(context, rows * window) if windowed else context) if attends else 0
        equation = [
            1.0,
            float(layers * (attends and not windowed)),
            float(layers * windowed),
            float(layers * (kind in ("draft_full", "draft_no_attention", "draft_window"))),
            float(layers * read),
        ]
        known_us = equation.pop() * slope if slope is not None else 0.0
        equations.append(equation)
        targets.append(max(time_us - known_us, 0.05 * time_us))
    found = nonnegative_least_squares(equations, targets)
    if slope is not None:
        found.append(slope)
    if all(kind != "draft_window" for kind, _, _ in cells):
        found[2] = found[1]
    return found
