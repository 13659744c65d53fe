# SPDX-License-Identifier: Apache-2.0
"""Quality and time of our solver while one setting changes at a time; see bench_solver.py."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solver_scoring import LEVELS, needed, score
from solver_session import OUR_REFERENCES, Case, Session, write

from knapspec_vllm.planner.solver import SolverSettings
from knapspec_vllm.planner.types import PlanEstimate

SWEPT = {
    "live_branches": (8, 16, 24, 32, 48, 64),
    "bins": (8, 16, 32, 64),
    "reference_tokens": (8, 16, 32, 48, 64),
}
SPEEDUPS = ("throughput speedup, predicted", "throughput speedup, choice")
_PANELS = (
    ("agreement on unseen text", [f"agreement at {level:.0%}" for level in LEVELS]),
    ("predicted speedup", list(SPEEDUPS)),
    ("seconds a solve", ["seconds"]),
)


def sweep(arguments: argparse.Namespace) -> int:
    """Writes solver-sweep.json and solver-sweep.png."""
    session = Session(arguments)
    default = {**dataclasses.asdict(SolverSettings()), "reference_tokens": OUR_REFERENCES}
    points = [
        (name, value)
        for name, values in SWEPT.items()
        for value in sorted({*values, default[name]})
    ]
    rows: dict[tuple[str, int], list[dict[str, float]]] = {point: [] for point in points}
    published = []
    for number, window in enumerate(session.windows, 1):
        case = session.case(window)
        case.ours()  # warm: the first solve of a shape is slower
        for name, value in points:
            settings = {**default, name: value}
            references = settings.pop("reference_tokens")
            plans, seconds = case.ours(SolverSettings(**settings), references)
            rows[name, value].append(_figures(case, plans, seconds, "planned"))
        plans, seconds = case.published()
        published.append(_figures(case, plans, seconds, "published"))
        print(f"  window {number} of {len(session.windows)}", flush=True)
    results: dict[str, Any] = {
        "default": default,
        "published": _means(published),
        "points": [
            {"setting": name, "value": value, **_means(figures)}
            for (name, value), figures in rows.items()
        ],
    }
    path = write(arguments, "solver-sweep", results)
    plot(results, path.with_suffix(".png"))
    for point in results["points"]:
        agreement = " / ".join(
            f"{point[f'agreement at {level:.0%}']['mean']:.3f}" for level in LEVELS
        )
        print(
            f"{point['setting']:<17}{point['value']:>4}  agreement {agreement}  speedup "
            f"{point[SPEEDUPS[0]]['mean']:.4f} / {point[SPEEDUPS[1]]['mean']:.4f}  "
            f"{point['seconds']['mean'] * 1e3:.0f} ms"
        )
    return 0


def _figures(
    case: Case, estimates: Sequence[PlanEstimate], seconds: float, rule: str
) -> dict[str, float]:
    case.judge(needed(estimates, case.pricing))
    return {**score(estimates, case.pricing, case.agreement, rule), "seconds": seconds}


def _means(figures: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard error of every figure over the windows that have it."""
    found = {}
    for _, names in _PANELS:
        for name in names:
            values = [row[name] for row in figures if not math.isnan(row[name])]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            mean = statistics.fmean(values) if values else math.nan
            found[name] = {"mean": mean, "standard_error": error, "windows": len(values)}
    return found


def plot(results: dict[str, Any], file: Path) -> None:
    """A row of panels for every figure, a column for every setting; the oracle dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = len(_PANELS), len(SWEPT)
    figure, axes = pyplot.subplots(*shape, figsize=(13, 10), sharex="col", sharey="row")
    for row, (label, names) in zip(axes, _PANELS, strict=True):
        for axis, setting in zip(row, SWEPT, strict=True):
            points = [point for point in results["points"] if point["setting"] == setting]
            values = [point["value"] for point in points]
            for number, name in enumerate(names):
                colour = f"C{number}"
                axis.errorbar(
                    values,
                    [point[name]["mean"] for point in points],
                    [point[name]["standard_error"] for point in points],
                    marker="o",
                    capsize=3,
                    color=colour,
                    label=name,
                )
                published = results["published"][name]["mean"]
                axis.axhline(published, linestyle="--", color=colour, linewidth=1)
            axis.axvline(results["default"][setting], color="0.8", zorder=0)
            if setting == next(iter(SWEPT)):
                axis.set_ylabel(label)
                axis.legend(fontsize=8)
            if names == ["seconds"]:
                axis.set_yscale("log")
                axis.set_xlabel(setting)
    figure.suptitle(
        "Solver settings, one changed at a time (grey: default); dashed: published solver; "
        "bars: standard error over windows"
    )
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    print(f"wrote {file.name}")
