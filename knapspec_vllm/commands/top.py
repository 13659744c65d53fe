# SPDX-License-Identifier: Apache-2.0
"""`knapspec top`: a live view of a running server, from its /metrics page alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from knapspec_vllm.commands.server_metrics import (
    Reading,
    ServerUnreachableError,
    read,
    summary,
)

DESCRIPTION = """\
Is it on, is it helping, what was chosen, why not: a running server's view of itself, renewed every
few seconds. Rates are of the time since the last renewal, counts of --once since the server's
start. Ctrl-C ends it. Exit status: 0 fine, 1 no answer; of --once, 3 the server does not use
KnapSpec."""
EXAMPLES = """\
examples:
  knapspec top http://127.0.0.1:8000
  knapspec top 127.0.0.1:8000 --once --json
  knapspec top 127.0.0.1:8000 --once --picture top.svg"""
NO_KNAPSPEC = 3


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "top",
        help="live view of a running server",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="the server's address, or that of its /metrics page")
    parser.add_argument("--interval", type=_seconds, default=2.0, metavar="SECONDS")
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument("--json", action="store_true", help="one JSON object a renewal")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="with --once: also save the view"
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.picture is not None and (not arguments.once or arguments.json):
        raise ValueError("--picture needs --once and no --json")
    now = read(arguments.url)
    if arguments.once:
        return _once(arguments, now)
    try:
        _follow(arguments, now)
    except KeyboardInterrupt:
        return 0
    return 0


def _once(arguments: argparse.Namespace, now: Reading) -> int:
    facts = summary(None, now)
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        console, view = _rich(record=arguments.picture is not None)
        console.print(view(facts))
        if arguments.picture is not None:
            console.save_svg(str(arguments.picture), title="knapspec top")
    return 0 if facts["knapspec"] else NO_KNAPSPEC


def _follow(arguments: argparse.Namespace, before: Reading) -> None:
    if arguments.json:
        while True:
            time.sleep(arguments.interval)
            now = read(arguments.url)
            print(json.dumps(summary(before, now)), flush=True)
            before = now
    console, view = _rich(record=False)
    from rich.live import Live

    with Live(view(summary(None, before)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(arguments.interval)
            with contextlib.suppress(ServerUnreachableError):  # a restart, perhaps: keep the view
                now = read(arguments.url)
                live.update(view(summary(before, now)), refresh=True)
                before = now


def _rich(record: bool) -> tuple[Any, Any]:
    """(console, function from a summary to what it prints)."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise RuntimeError(
            "the view needs the package rich: pip install rich, or write --json"
        ) from error
    from knapspec_vllm.commands.top_view import view

    return Console(record=record, width=100 if record else None), view


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 3600 seconds")
    return value
