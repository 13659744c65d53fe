# SPDX-License-Identifier: Apache-2.0
"""Plots of a benchmark, drawn from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from knapspec_vllm.bench.arms import PLAIN
from knapspec_vllm.bench.figures import Figures, quotient
from knapspec_vllm.bench.results import Measurement, Results

#: A prediction within these is called good.
BAND = (0.95, 1.05)
_DPI = 130


def save_plots(results: Results, rows: Sequence[Figures], folder: Path) -> list[Path]:
    """Draw all plots; raises RuntimeError naming what to install when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(
            'the plots need matplotlib: pip install "knapspec-vllm[bench]"; `knapspec bench '
            "--report FOLDER` then draws them"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plots: dict[str, Callable[[Any, Results, Sequence[Figures]], Any]] = {
        "speedup-heatmap.png": _heatmaps,
        "predicted.png": _predicted,
        "breakdown.png": _breakdown,
        "acceptance.png": _acceptance,
    }
    if len({row.arm for row in rows}) > 2:
        plots["strategies.png"] = _strategies
    written = []
    for name, draw in plots.items():
        figure = draw(plt, results, rows)
        figure.savefig(folder / name, dpi=_DPI)
        plt.close(figure)
        written.append(folder / name)
    return written


def _heatmaps(plt: Any, results: Results, rows: Sequence[Figures]) -> Any:
    """Measured speedup over batch and context: a column per arm, a row per temperature."""
    from matplotlib.colors import TwoSlopeNorm

    arms = knapspec_family(results) or _others(rows)
    heats = sorted({cell.temperature for cell in results.cells})
    batches = sorted({cell.batch for cell in results.cells})
    contexts = sorted({cell.context for cell in results.cells})
    ratios = {(r.arm, r.batch, r.context, r.temperature): r.ratio for r in rows}
    known = [ratio for key, ratio in ratios.items() if ratio and key[0] in arms] or [1.0]
    # Blue is faster, red slower; the same scale everywhere, and 1 in its middle.
    reach = max(0.1, *(abs(ratio - 1) for ratio in known))
    norm = TwoSlopeNorm(1.0, 1 - reach, 1 + reach)
    width, height = 1.6 + 0.8 * len(contexts), 1.6 + 0.5 * len(batches)
    figure, axes = plt.subplots(
        len(heats), max(1, len(arms)), squeeze=False, layout="constrained",
        figsize=(0.8 + width * max(1, len(arms)), 0.4 + height * len(heats)),
    )  # fmt: skip
    image = None
    for line, heat in zip(axes, heats, strict=True):
        for axis, arm in zip(line, arms, strict=False):
            table = [[ratios.get((arm, b, c, heat)) for c in contexts] for b in batches]
            image = axis.imshow(
                [[float("nan") if v is None else v for v in line] for line in table],
                aspect="auto", origin="lower", cmap="RdBu", norm=norm,
            )  # fmt: skip
            for y, values in enumerate(table):
                for x, value in enumerate(values):
                    text = "-" if value is None else f"{value:.2f}x"
                    dark = value is not None and abs(value - 1) > 0.7 * reach
                    axis.text(x, y, text, ha="center", va="center", color="w" if dark else "k")
            axis.set_title(arm if len(heats) == 1 else f"{arm}, temperature {heat:g}", fontsize=10)
            axis.set_xticks(range(len(contexts)), contexts)
            axis.set_yticks(range(len(batches)), batches)
            axis.set_xlabel("context, tokens a row")
            axis.set_ylabel("batch, rows")
    if image is not None:
        figure.colorbar(image, ax=axes, label="decode speed over plain vLLM", shrink=0.9)
    return figure


def _predicted(plt: Any, results: Results, rows: Sequence[Figures]) -> Any:
    """Measured against predicted speedup of every cell."""
    figure, axis = plt.subplots(figsize=(6, 5.5), layout="constrained")
    points = [row for row in rows if row.predicted and row.ratio]
    ends = [(row.predicted, row.ratio_p20, row.ratio_p80) for row in points]
    values = [value for end in ends for value in end if value] or [1.0]
    low, high = min(0.8, *values) * 0.95, max(1.2, *values) * 1.05
    edge = [low, high]
    axis.fill_between(
        edge, [BAND[0] * v for v in edge], [BAND[1] * v for v in edge], color="0.9",
        label=f"{BAND[0]} to {BAND[1]} of the prediction",
    )  # fmt: skip
    axis.plot(edge, edge, color="0.5", lw=1)
    axis.axhline(1, color="0.7", lw=0.8, ls=":")
    for number, arm in enumerate(dict.fromkeys(row.arm for row in points)):
        mine = [row for row in points if row.arm == arm]
        x, y = [row.predicted or 0 for row in mine], [row.ratio or 0 for row in mine]
        below = [v - (row.ratio_p20 or v) for v, row in zip(y, mine, strict=True)]
        above = [(row.ratio_p80 or v) - v for v, row in zip(y, mine, strict=True)]
        # A median lies between the percentiles, but for rounding.
        errors = [[max(0.0, e) for e in below], [max(0.0, e) for e in above]]
        axis.errorbar(x, y, errors, fmt="os^Dv<>p"[number % 8], ms=5, lw=0.8, label=arm)
        for row in mine:
            where = (row.predicted, row.ratio)
            axis.annotate(_short(row), where, (4, 3), textcoords="offset points", fontsize=6)
    if not points:
        _say_nothing(axis, "no arm recorded predictions")
    axis.set(xlim=edge, ylim=edge, xlabel="predicted speedup", ylabel="measured speedup")
    axis.set_title("bars: 20th to 80th percentile of the rounds' ratios", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _breakdown(plt: Any, results: Results, rows: Sequence[Figures]) -> Any:
    """Where the time of one round goes; what no phase accounts for is "rest"."""
    bars = [(m, _phases(m)) for m in _knapspec_measurements(results)]
    bars = [(m, phases) for m, phases in bars if phases]
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.32 * max(3, len(bars))), layout="constrained")
    labels = [f"{m.arm}: {_cell(m)}" for m, _ in bars]
    colours = plt.get_cmap("tab10")
    left = [0.0] * len(bars)
    for number, phase in enumerate(dict.fromkeys(name for _, phases in bars for name in phases)):
        widths = [phases.get(phase, 0.0) for _, phases in bars]
        colour = "0.85" if phase == "rest" else colours(number % 10)
        axis.barh(range(len(bars)), widths, left=left, label=phase, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    if bars:
        axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    else:
        _say_nothing(axis, "no arm recorded phases")
    axis.set_yticks(range(len(bars)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds per round")
    return figure


def _phases(measurement: Measurement) -> dict[str, float]:
    """Milliseconds per round; the rest is measured decode time in no phase."""
    stats = (measurement.knapspec or {}).get("stats") or {}
    rounds, phases = stats.get("rounds"), stats.get("phase_us") or {}
    if not rounds or not phases:
        return {}
    found = {name: value / rounds / 1e3 for name, value in phases.items()}
    whole = 1e3 * sum(r.decode_seconds for r in measurement.rounds) / rounds
    rest = whole - sum(found.values())
    return {**found, "rest": rest} if rest > 0 else found


def _acceptance(plt: Any, results: Results, rows: Sequence[Figures]) -> Any:
    """Share of the tokens drafted at each position that were accepted."""
    lines = [(m, by_position(m)) for m in results.whole() if m.arm != PLAIN]
    lines = [(m, shares) for m, shares in lines if any(v is not None for v in shares)]
    arms = list(dict.fromkeys(m.arm for m, _ in lines))
    figure, axes = plt.subplots(
        1, max(1, len(arms)), figsize=(1.5 + 3.2 * max(1, len(arms)), 3.6), squeeze=False,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for axis, arm in zip(axes[0], arms, strict=False):
        for m, shares in lines:
            if m.arm == arm:
                known = [(i, v) for i, v in enumerate(shares, 1) if v is not None]
                axis.plot(*zip(*known, strict=True), marker="o", ms=3, lw=1, label=_cell(m))
        axis.set(title=arm, xlabel="position in the draft", ylim=(0, 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=6)
    axes[0][0].set_ylabel("accepted share of drafted tokens")
    if not arms:
        _say_nothing(axes[0][0], "nothing was drafted")
    return figure


def by_position(measurement: Measurement) -> list[float | None]:
    """Accepted over drafted tokens; vLLM's methods count drafts only, of any length."""
    stats = (measurement.knapspec or {}).get("stats") or {}
    drafted, hits = stats.get("drafted_by_position"), stats.get("accepted_by_position")
    if measurement.knapspec is None:
        hits = measurement.counters.get("num_accepted_tokens_per_pos")
        drafted = [measurement.counters.get("num_drafts")] * len(hits or ())
    return [quotient(a, b) for a, b in zip(hits or (), drafted or (), strict=False)]


def _strategies(plt: Any, results: Results, rows: Sequence[Figures]) -> Any:
    """All arms side by side in every cell."""
    arms = _others(rows)
    cells = list(dict.fromkeys((r.batch, r.context, r.temperature) for r in rows))
    figure, axis = plt.subplots(
        figsize=(2 + 0.28 * len(cells) * (len(arms) + 1), 4), layout="constrained"
    )
    width = 0.85 / max(1, len(arms))
    for number, arm in enumerate(arms):
        mine = {(r.batch, r.context, r.temperature): r for r in rows if r.arm == arm and r.ratio}
        there = [(i, mine[cell]) for i, cell in enumerate(cells) if cell in mine]
        x = [i + (number - (len(arms) - 1) / 2) * width for i, _ in there]
        y = [row.ratio or 0 for _, row in there]
        low = [max(0.0, v - (row.ratio_p20 or v)) for v, (_, row) in zip(y, there, strict=True)]
        high = [max(0.0, (row.ratio_p80 or v) - v) for v, (_, row) in zip(y, there, strict=True)]
        axis.bar(x, y, width, yerr=[low, high], label=arm, error_kw={"lw": 0.8})
    axis.axhline(1, color="k", lw=0.8)
    labels = [f"{b} x {c}" + (f"\nT {t:g}" if t else "") for b, c, t in cells]
    axis.set_xticks(range(len(cells)), labels, fontsize=8)
    axis.set(xlabel="batch x context", ylabel="decode speed over plain vLLM")
    axis.legend(frameon=False, fontsize=8, ncols=min(4, max(1, len(arms))))
    return figure


def knapspec_family(results: Results) -> list[str]:
    """Arms that KnapSpec serves, whatever plans for them."""
    configs = {name: arm.get("speculative_config") or {} for name, arm in results.arms.items()}
    return [name for name, config in configs.items() if config.get("method") == "knapspec"]


def _knapspec_measurements(results: Results) -> list[Measurement]:
    return [m for m in results.whole() if m.knapspec is not None]


def _others(rows: Sequence[Figures]) -> list[str]:
    return list(dict.fromkeys(row.arm for row in rows if row.arm != PLAIN))


def _short(row: Figures) -> str:
    return f"{row.batch}x{row.context}" + (f" T{row.temperature:g}" if row.temperature else "")


def _cell(m: Measurement) -> str:
    heat = f" T{m.cell.temperature:g}" if m.cell.temperature else ""
    return f"{m.cell.batch} x {m.cell.context}{heat}"


def _say_nothing(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="0.4")
