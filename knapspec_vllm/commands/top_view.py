# SPDX-License-Identifier: Apache-2.0
"""The terminal view of `knapspec top`, drawn with rich."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_WIDTH = 49
_FULL, _EMPTY = "█", "░"
#: Phase of a round -> its colour; the order is that of the bar.
_PHASES = {"verify": "cyan", "draft": "green", "plan": "magenta", "overhead": "yellow"}
#: `skipped_steps_total` reason -> plain words.
REASONS = {
    "no gain": "drafting is predicted to lose",
    "no plan": "no plan yet",
    "no room": "requests about to end",
    "opted out": "all requests opted out",
    "no costs": "no cost curves",
    "measuring": "measuring plain decoding",
    "set to zero": "draft_length is 0",
}


def view(facts: dict[str, Any]) -> RenderableType:
    """A page from `server_metrics.summary`."""
    if not facts["knapspec"]:
        return Panel(
            Text(
                f"{facts['model'] or 'This server'} answers, but shows no knapspec: metrics. Was "
                'it started with --speculative-config \'{"method": "knapspec"}\'?'
            ),
            title="knapspec top",
            border_style="yellow",
        )
    return Group(
        _headline(facts),
        Columns([_helping(facts), _plan(facts)], expand=False),
        Columns([_acceptance(facts), _time(facts)], expand=False),
        _declined(facts),
    )


def _headline(facts: dict[str, Any]) -> Text:
    text = Text(f" {facts['model']} ", style="bold")
    on = facts["drafting"]
    text.append(" drafting " if on else " declining ", style=f"bold {'green' if on else 'yellow'}")
    text.append(f" {facts['running']:.0f} running, {facts['waiting']:.0f} waiting")
    if facts["engines"] > 1:
        text.append(f", {facts['engines']} engines")
    calibration = facts["calibration"]
    if calibration:
        text.append(f"  {calibration['hardware']}, curves {calibration['source']}", style="dim")
    return text


def _helping(facts: dict[str, Any]) -> Panel:
    return _facts(
        "Is it helping",
        {
            "speedup over plain steps": _number(facts["speedup"], "{:.2f}x"),
            "predicted by the plan": _number(facts["predicted_speedup"], "{:.2f}x"),
            "tokens/s": _number(facts["tokens_per_second"], "{:.1f}"),
            "ms between tokens": _number(facts["inter_token_ms"], "{:.1f}"),
            "rounds that drafted": f"{facts['drafting_rounds']:.0f} of {facts['rounds']:.0f}",
        },
    )


def _plan(facts: dict[str, Any]) -> Panel:
    plan = facts["plan"]
    layers = plan["layers"] or 0
    lines: dict[str, RenderableType] = {}
    for name, key in (
        ("attention skipped", "skipped_attention"),
        ("attention windowed", "windowed"),
        ("MLP skipped", "skipped_mlp"),
    ):
        count = plan[key] or 0
        lines[name] = Text(f"{bar(count / layers if layers else 0, 14)} {count:.0f} of {layers}")
    lines["draft length"] = _number(plan["draft_length"], "{:.0f}")
    lines["changes, solves"] = f"{plan['changes']:.0f}, {facts['solves']:.0f}"
    return _facts("Plan", lines)


def _acceptance(facts: dict[str, Any]) -> Panel:
    lines: dict[str, RenderableType] = {
        "observed": _number(facts["acceptance"], "{:.0%}"),
        "expected of the plan": _number(facts["believed_acceptance"], "{:.0%}"),
    }
    for position, share in enumerate(facts["acceptance_by_position"][:8], 1):
        lines[f"position {position}"] = Text(f"{bar(share, 14)} {share:.0%}")
    return _facts("Acceptance", lines)


def _time(facts: dict[str, Any]) -> Panel:
    spent = facts["phase_seconds"]
    total = sum(spent.values())
    lines: dict[str, RenderableType] = {}
    for phase, colour in _PHASES.items():
        share = spent.get(phase, 0.0) / total if total else 0.0
        lines[phase] = Text(f"{bar(share, 14)} {share:.1%}", style=colour)
    return _facts("Time of a round", lines)


def _declined(facts: dict[str, Any]) -> Panel:
    rounds = facts["rounds"]
    lines: dict[str, RenderableType] = {}
    for reason, count in sorted(facts["declined"].items(), key=lambda item: -item[1]):
        share = count / rounds if rounds else 0.0
        lines[REASONS.get(reason, reason)] = Text(f"{bar(share, 30)} {share:.0%} of rounds")
    return _facts("Why not", lines or {"every round drafted": ""}, width=2 * _WIDTH + 1)


def _facts(title: str, lines: dict[str, Any], width: int = _WIDTH) -> Panel:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for name, value in lines.items():
        table.add_row(Text(name, style="dim"), value)
    return Panel(table, title=title, title_align="left", box=box.ROUNDED, width=width)


def bar(share: float, width: int) -> str:
    """`share` of 1 as a bar of `width` characters."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return _FULL * filled + _EMPTY * (width - filled)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
