# SPDX-License-Identifier: Apache-2.0
"""The benchmark's results as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from knapspec_vllm.bench.arms import PLAIN
from knapspec_vllm.bench.figures import SLOWER, Figures, summaries
from knapspec_vllm.bench.results import Cell, Results

_COLUMNS = (
    ("tokens/s", 8), ("p20..p80", 13), ("min", 7), ("ms/token", 8), ("ttft ms", 8),
    ("ratio", 7), ("p20..p80", 12), ("minima", 7), ("full", 7), ("predicted", 9), ("accept", 6),
    ("length", 6), ("identical", 9),
)  # fmt: skip
NOTES = (
    "tokens/s: of decoding, from the first token of a batch's last row to the batch's last step "
    "but one (as many draft chains as verify steps), by the engine's time stamps (prompts are in "
    "the prefix cache); median over rounds. "
    "ms/token: per request.",
    "ttft: of rows that arrive together, nothing cached. ratio: tokens/s over plain's, round by "
    "round. minima: of the fastest rounds. full: while no row of the batch has ended, as in a "
    "server that fills it up again. length: tokens per verified draft.",
)
_WIDTH = 140


def cell_table(rows: Sequence[Figures]) -> str:
    """All arms of one cell."""
    names = max(12, *(len(row.arm) for row in rows))
    head = " ".join([f"{'':<{names}}", *(f"{title:>{width}}" for title, width in _COLUMNS)])
    lines = [str(Cell(rows[0].batch, rows[0].context, rows[0].temperature)), head]
    for row in rows:
        values = zip(_values(row), _COLUMNS, strict=True)
        cells = (f"{value:>{width}}" for value, (_, width) in values)
        lines.append(" ".join([f"{row.arm:<{names}}", *cells]).rstrip())
        lines += _remarks(row, names + 1)
    return "\n".join(lines)


def _values(row: Figures) -> tuple[str, ...]:
    return (
        f"{row.tokens_per_second:.1f}",
        f"{row.tokens_per_second_p20:.1f}..{row.tokens_per_second_p80:.1f}",
        f"{row.tokens_per_second_min:.1f}",
        _number(row.tpot_ms, ".2f"),
        _number(row.ttft_ms, ".0f"),
        _number(row.ratio, ".3f", "x"),
        "-" if row.ratio_p20 is None else f"{row.ratio_p20:.2f}..{row.ratio_p80:.2f}",
        _number(row.ratio_of_minima, ".3f", "x"),
        _number(row.ratio_full_batch, ".3f", "x"),
        _number(row.predicted, ".3f", "x"),
        _number(row.acceptance, ".0%"),
        _number(row.accepted_length, ".2f"),
        "-" if row.compared is None else f"{row.identical}/{row.compared}",
    )


def _remarks(row: Figures, indent: int) -> list[str]:
    """What else a reader must know, below the arm's line."""
    texts = []
    if row.decision is not None:
        plan = (
            "" if row.plan is None else f"; last plan: {row.plan}, draft length {row.draft_length}"
        )
        share = "" if row.drafting is None else f"drafted in {row.drafting:.0%} of rounds; "
        texts.append(f"{share}last decision: {row.decision}{plan}")
    if len(row.ratio_by_start) > 1:
        texts.append("by start: " + " ".join(f"{ratio:.3f}x" for ratio in row.ratio_by_start))
    if row.memory_mib is not None:
        added = row.arm != PLAIN and row.memory_added_mib is not None
        than = f", {row.memory_added_mib:+,.0f} MiB over plain" if added else ""
        texts.append(f"memory {row.memory_mib:,.0f} MiB{than}")
    if not row.exact:
        texts.append(
            "this vLLM gave no time stamps: wall clock, with what is left of prefill in it"
        )
    if row.ratio is not None and not row.alternated:
        texts.append("did not take turns with plain: one engine at a time fits")
    lines = (textwrap.wrap(text, _WIDTH - indent, subsequent_indent="  ") for text in texts)
    return [" " * indent + line for wrapped in lines for line in wrapped]


def tables(rows: Sequence[Figures]) -> str:
    """One table per cell."""
    cells = dict.fromkeys((row.batch, row.context, row.temperature) for row in rows)
    return "\n\n".join(
        cell_table([row for row in rows if (row.batch, row.context, row.temperature) == cell])
        for cell in cells
    )


def summary(rows: Sequence[Figures], results: Results) -> str:
    """One line an arm, then what was left out."""
    names = max([12, *(len(row.arm) for row in rows)])
    slower = f"below {SLOWER}x"
    lines = [f"{'summary':<{names}} {'geometric mean':>14} {slower:>13}  worst cell"]
    for entry in summaries(rows):
        worst = entry.worst
        where = Cell(worst.batch, worst.context, worst.temperature)
        share = f"{entry.slower} of {entry.cells}"
        lines.append(
            f"{entry.arm:<{names}} {entry.geometric_mean:>13.3f}x {share:>13}  "
            f"{_number(worst.ratio, '.3f', 'x')} at {where}"
        )
    lines += [f"left out: {name}, {reason}" for name, reason in results.left_out.items()]
    starts = int(results.settings.get("starts", 1))
    expected = [(arm, cell) for arm in results.arms for cell in results.cells]
    missing = sum(len(results.parts(arm, cell)) < starts for arm, cell in expected)
    if missing:
        lines.append(f"not measured yet: {missing} of {len(expected)} (--resume goes on)")
    return "\n".join(lines)


def header(results: Results) -> str:
    """What ran, where."""
    where, what = results.provenance, results.settings
    plain = results.arms.get(PLAIN, {}).get("engine") or {}
    versions = " ".join(f"{name} {text}" for name, text in where.get("versions", {}).items())
    engine = [str(plain.get("device", where.get("device"))), f"{where.get('cores')} cores"]
    if plain:
        engine += [
            f"{plain.get('threads')} compute threads",
            str(plain.get("dtype")),
            "eager" if plain.get("eager") else "compiled as shipped",
            f"async scheduling {'on' if plain.get('async_scheduling') else 'off'} in plain",
        ]
    lines = [
        f"{what.get('model')}, {what.get('workload')} text: {', '.join(engine)}",
        f"{versions}; git {where.get('git')}; {where.get('date')}",
    ]
    return "\n".join(lines)


def notes() -> str:
    return "\n".join(textwrap.fill(note, _WIDTH, subsequent_indent="  ") for note in NOTES)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
