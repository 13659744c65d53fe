# SPDX-License-Identifier: Apache-2.0
"""Draws the Grafana dashboard's panels from a Prometheus, without Grafana.

The layout, titles, units and queries are those of the dashboard's JSON; only the pen is matplotlib.
"""

from __future__ import annotations

import json
import math
import urllib.parse
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from tests.monitoring import DASHBOARD, filled

_UNITS: dict[str, Callable[[float], str]] = {
    "percentunit": lambda v: f"{v:.0%}",
    "s": lambda v: f"{v * 1e3:.0f} ms" if abs(v) < 1 else f"{v:.0f} s",
    "bytes": lambda v: f"{v / 2**20:.0f} MiB",
    "ops": lambda v: f"{v:.3g}/s",
}
_ROW_INCHES, _WIDTH_INCHES = 0.3, 16


def draw(url: str, start: float, end: float, path: Path, step: float = 5.0) -> None:
    """Panels over [start, end], seconds of the epoch, of the Prometheus at `url`."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(_WIDTH_INCHES, rows * _ROW_INCHES), facecolor="white")
    grid = figure.add_gridspec(rows, 24, left=0.03, right=0.99, top=0.985, bottom=0.015)
    for panel in panels:
        place = panel["gridPos"]
        cell = grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]]
        if panel["type"] == "row":
            axis = figure.add_subplot(cell)
            axis.axis("off")
            axis.text(0, 0.2, panel["title"], fontsize=13, fontweight="bold")
            continue
        # Room for the panel's title and axes inside its cell.
        inner = cell.subgridspec(100, 100)[14:84, 12:95]
        axis = figure.add_subplot(inner)
        axis.set_title(panel["title"], fontsize=9, loc="left")
        found = [
            (target, ranged(url, filled(target["expr"]), start, end, step))
            for target in panel["targets"]
        ]
        _PAINTERS[panel["type"]](axis, panel, found, start)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def ranged(url: str, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
    """Series of a range query."""
    asked = {"query": query, "start": start, "end": end, "step": step}
    data = urllib.parse.urlencode(asked).encode()
    with urllib.request.urlopen(f"{url}/api/v1/query_range", data, timeout=60) as answer:
        return json.loads(answer.read())["data"]["result"]


def _legend(target: dict[str, Any], series: dict[str, Any]) -> str:
    text = target["legendFormat"]
    for name, value in series["metric"].items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def _numbers(series: dict[str, Any], start: float) -> tuple[list[float], list[float]]:
    times = [(at - start) / 60 for at, _ in series["values"]]
    return times, [float(value) for _, value in series["values"]]


def _unit(panel: dict[str, Any]) -> Callable[[float], str]:
    return _UNITS.get(panel["fieldConfig"]["defaults"].get("unit", ""), lambda v: f"{v:.4g}")


def _stat(axis: Any, panel: dict[str, Any], found: Any, start: float) -> None:
    axis.axis("off")
    (_, series) = found[0]
    text = "No traffic"
    if series:
        value = float(series[0]["values"][-1][1])
        mapped = {
            key: entry["text"]
            for mapping in panel["fieldConfig"]["defaults"]["mappings"]
            if mapping["type"] == "value"
            for key, entry in mapping["options"].items()
        }
        decimals = panel["fieldConfig"]["defaults"]["decimals"]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        plain = f"{value:.{decimals}f}" if unit == "none" else _unit(panel)(value)
        text = mapped.get(f"{value:.0f}", plain) if mapped else plain
    axis.text(0.0, 0.4, text, fontsize=20, color="#2f6f4f")


def _series(axis: Any, panel: dict[str, Any], found: Any, start: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    lines = [(_legend(t, s), *_numbers(s, start)) for t, group in found for s in group]
    if not lines:
        axis.text(0.5, 0.5, "No traffic", ha="center", transform=axis.transAxes, color="grey")
    elif defaults["custom"]["stacking"]["mode"] == "normal":
        times = sorted({at for _, when, _ in lines for at in when})
        values = [
            [dict(zip(when, value, strict=True)).get(at, 0.0) for at in times]
            for _, when, value in lines
        ]
        clean = [[0.0 if math.isnan(v) else v for v in row] for row in values]
        axis.stackplot(times, *clean, labels=[name for name, _, _ in lines], alpha=0.8)
    else:
        for name, when, value in lines:
            axis.plot(when, value, label=name, linewidth=1.4)
    if defaults.get("custom", {}).get("thresholdsStyle"):
        axis.axhline(1.0, color="red", linewidth=0.8)
    bottom, top = axis.get_ylim()
    axis.set_ylim(defaults.get("min", bottom), defaults.get("max", top))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _unit(panel)(v)))
    axis.tick_params(labelsize=7)
    if lines:
        axis.legend(fontsize=7, loc="best", framealpha=0.6)


def _heatmap(axis: Any, panel: dict[str, Any], found: Any, start: float) -> None:
    (_, series) = found[0]
    rows = sorted(series, key=lambda s: float(s["metric"]["le"]))
    axis.tick_params(labelsize=7)
    if not rows:
        axis.text(0.5, 0.5, "No traffic", ha="center", transform=axis.transAxes, color="grey")
        return
    times = sorted({at for row in rows for at, _ in row["values"]})
    cumulated = [[float(dict(row["values"]).get(at, 0)) for at in times] for row in rows]
    counts = [cumulated[0]] + [
        [max(0.0, b - a) for a, b in zip(low, high, strict=True)]
        for low, high in pairwise(cumulated)
    ]
    minutes = (times[-1] - start) / 60
    axis.imshow(
        counts, aspect="auto", origin="lower", cmap="Oranges", interpolation="nearest",
        extent=((times[0] - start) / 60, max(minutes, 0.1), 0, len(rows)),
    )  # fmt: skip
    axis.set_yticks([i + 1 for i in range(len(rows))], [row["metric"]["le"] for row in rows])


_PAINTERS = {"stat": _stat, "timeseries": _series, "heatmap": _heatmap}
