# SPDX-License-Identifier: Apache-2.0
"""Our solver against the published one: `python tests/benchmarks/bench_solver.py quality`.

quality  predicted speedup and out-of-sample agreement of both frontiers over windows of text
speed    time of one solve, ours at its defaults and the oracle as published, in alternation
sweep    quality and time against live_branches, bins and reference tokens; a plot and JSON

Model: SmolLM2-135M-Instruct in plain torch. A window's last tokens before its boundary are the
reference tokens, its next 96 tokens judge the plans. The oracle (tests/published_solver.py) has 48
reference tokens and gets the target's states free of charge; ours runs the target itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from solver_scoring import LEVELS, Paired, needed, score
from solver_session import OUR_REFERENCES, Session, write
from solver_sweep import sweep

MOST_AGREEMENT_LOST = 0.005
LEAST_SPEED_RATIO = 8.0
SIDES = ("ours", "published")
OVERALL = "agreement, mean of levels"
OWN_SPEEDUP = "throughput speedup, own"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, windows) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument("--windows", type=int, default=windows, help="texts, of three kinds")
        command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
        command.add_argument(
            "--costs", type=Path, help="CostModel as JSON (default: measured for this model)"
        )
        command.add_argument(
            "--weights",
            type=float,
            nargs=2,
            metavar=("ATTENTION", "MLP"),
            help="divide the items' time in this ratio (default costs: 1 3)",
        )
        command.add_argument("--out", type=Path, help="folder of the results (default: results/)")
        if name != "sweep":
            command.add_argument(
                "--check", action="store_true", help="exit with status 1 below the limits"
            )
            command.add_argument(
                "--reference-tokens", type=int, default=OUR_REFERENCES, help="of ours"
            )
        if name == "quality":
            command.add_argument(
                "--only-chosen",
                action="store_true",
                help="judge only the plans that are picked; leaves out the speedups 'known'",
            )
        if name == "speed":
            command.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    return COMMANDS[arguments.command][0](arguments)


def quality(arguments: argparse.Namespace) -> int:
    session = Session(arguments)
    rows = []
    for number, window in enumerate(session.windows, 1):
        started = time.perf_counter()
        case = session.case(window)
        found = {
            "ours": case.ours(references=arguments.reference_tokens),
            "published": case.published(),
        }
        for estimates, _ in found.values():
            case.judge(needed(estimates, case.pricing))
            if not arguments.only_chosen:
                case.judge([estimate.plan for estimate in estimates])
        row: dict[str, Any] = {
            "text": f"{window.source}: {window.name}",
            "boundary": window.boundary,
        }
        for side, (estimates, seconds) in found.items():
            scored = score(estimates, case.pricing, case.agreement)
            row[side] = {**scored, "plans": len(estimates), "seconds": seconds}
        rows.append(row)
        print(
            f"  {number:>2} {window.source:<6} {window.boundary:>3} tokens: solved in "
            f"{found['ours'][1]:.1f} and {found['published'][1]:.1f} s, {len(case.agreement)} "
            f"plans judged, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )
    summary = paired(rows)
    print_summary(summary)
    speedup, agreement = summary[OWN_SPEEDUP], summary[OVERALL]
    verdicts = [
        verdict(speedup.difference >= 0, f"{OWN_SPEEDUP}: {speedup.difference:+.4f}, at least 0"),
        verdict(
            agreement.difference >= -MOST_AGREEMENT_LOST,
            f"{OVERALL}: {agreement.difference:+.4f}, at least {-MOST_AGREEMENT_LOST}",
        ),
    ]
    figures = {name: asdict(pair) for name, pair in summary.items()}
    references = {"reference_tokens": arguments.reference_tokens}
    write(arguments, "solver-quality", {**references, "summary": figures, "texts": rows})
    return 0 if all(verdicts) or not arguments.check else 1


def paired(rows: list[dict[str, Any]]) -> dict[str, Paired]:
    """Every figure of both sides over the windows."""
    for row in rows:
        for side in SIDES:
            # nan as soon as one level is missing: such a window does not count.
            levels = [row[side][f"agreement at {level:.0%}"] for level in LEVELS]
            row[side][OVERALL] = statistics.fmean(levels)
    names = [name for name in rows[0]["ours"] if all(name in row[s] for row in rows for s in SIDES)]
    return {
        name: Paired.of(*([row[side][name] for row in rows] for side in SIDES)) for name in names
    }


def print_summary(summary: dict[str, Paired]) -> None:
    print(f"\n{'':<28}{'ours':>9}{'published':>11}{'difference':>12}{'s.e.':>9}{'windows':>9}")
    for name, pair in sorted(summary.items()):
        print(
            f"{name:<28}{pair.ours:>9.4f}{pair.published:>11.4f}{pair.difference:>+12.4f}"
            f"{pair.standard_error:>9.4f}{pair.windows:>9}"
        )
    print(
        "agreement: top-1, out of sample, of the plan with the best own agreement that saves at\n"
        "least so much item time. speedup: predicted, at the best draft length of 1 to 8;\n"
        "own: alpha is the solver's own agreement, shrunk; choice: the same plan and length with\n"
        "out-of-sample alpha; known: the best of the frontier had that alpha been known.\n"
    )


def verdict(passed: bool, text: str) -> bool:
    print(f"{'pass' if passed else 'FAIL'}  {text}")
    return passed


def speed(arguments: argparse.Namespace) -> int:
    session = Session(arguments)
    cases = [session.case(window) for window in session.windows]
    references = arguments.reference_tokens
    cases[0].ours(references=references)
    cases[0].published()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(1, arguments.rounds + 1):
        # Who goes first changes from round to round.
        sides = SIDES if number % 2 else SIDES[::-1]
        totals = dict.fromkeys(SIDES, 0.0)
        for case in cases:
            for side in sides:
                ours = side == "ours"
                _, taken = case.ours(references=references) if ours else case.published()
                totals[side] += taken / len(cases)
        for side in SIDES:
            seconds[side].append(totals[side])
        print(
            f"  round {number} of {arguments.rounds}: ours {totals['ours'] * 1e3:.0f} ms, "
            f"published {totals['published'] * 1e3:.0f} ms a solve",
            flush=True,
        )
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["published"], strict=True)]
    ratio = statistics.median(ratios)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    print(
        f"medians: ours {medians['ours'] * 1e3:.0f} ms, published "
        f"{medians['published'] * 1e3:.0f} ms a solve; rounds {min(ratios):.1f} to "
        f"{max(ratios):.1f}x"
    )
    passed = verdict(ratio >= LEAST_SPEED_RATIO, f"{ratio:.1f}x, at least {LEAST_SPEED_RATIO}x")
    figures = {"reference_tokens": references, "seconds": seconds, "ratios": ratios, "ratio": ratio}
    write(arguments, "solver-speed", figures)
    return 0 if passed or not arguments.check else 1


COMMANDS = {"quality": (quality, 50), "speed": (speed, 3), "sweep": (sweep, 12)}
"""Function and default number of windows."""

if __name__ == "__main__":
    sys.exit(main())
