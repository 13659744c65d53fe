# SPDX-License-Identifier: Apache-2.0
"""Our solver against the published one: `python tests/benchmarks/bench_solver.py quality`.

quality  predicted speedup and out-of-sample agreement of both frontiers over windows of text
speed    time of one solve, ours at its defaults and the oracle as published, in alternation
sweep    quality and time against live_branches, bins and reference tokens; a plot and JSON

Model: SmolLM2-135M-Instruct in plain torch. A window's last tokens before its boundary are the
reference tokens, its next 96 tokens judge the plans. The oracle (tests/published_solver.py) has 48
reference tokens and gets the target's states free of charge; ours runs the target itself, on 16
tokens by default. Search is compared on the same 48 tokens, and what is served at the defaults.
For `speed` ours runs as it is served, inside vLLM.
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
from solver_serving import Solve, at_first_round, serving
from solver_session import OUR_REFERENCES, Session, write
from solver_sweep import sweep
from solver_windows import PUBLISHED_REFERENCES

MOST_AGREEMENT_LOST = 0.005
LEAST_SPEED_RATIO = 8.0
SIDES = ("ours", "published")
#: Column of the table -> (solver, rule of solver_scoring.RULES).
COLUMNS = {
    "ours": ("ours", "planned"),
    "published": ("published", "published"),
    "published, planned": ("published, counted", "planned"),
    "ours, counted": ("ours, counted", "planned"),
    "ours, same states": ("ours, same states", "planned"),
}
OVERALL = "agreement, mean of levels"
PREDICTED = "throughput speedup, predicted"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, windows) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument("--windows", type=int, default=windows, help="texts, of three kinds")
        command.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
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
        if name == "quality":
            command.add_argument(
                "--reference-tokens", type=int, default=OUR_REFERENCES, help="of ours"
            )
            command.add_argument(
                "--only-chosen",
                action="store_true",
                help="judge only the plans that are picked; leaves out the speedups 'known'",
            )
        if name == "speed":
            command.add_argument("--rounds", type=int, default=5)
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
            "ours, same states": case.ours(references=PUBLISHED_REFERENCES),
        }
        # What plans agree on with the target among the oracle's tokens, counted by one instrument:
        # in bfloat16 the oracle's own packed passes count 0.2 tokens of 48 more for a same plan,
        # and the highest of fifty such counts is worth 0.003 of predicted speedup.
        counted = {
            "ours, counted": "ours",
            "published, counted": "published",
            "ours, same states": "ours, same states",
        }
        found |= {
            name: (case.counted_anew(found[side][0]), found[side][1])
            for name, side in counted.items()
        }
        for estimates, _ in found.values():
            case.judge(needed(estimates, case.pricing))
            if not arguments.only_chosen:
                case.judge([estimate.plan for estimate in estimates])
        row: dict[str, Any] = {
            "text": f"{window.source}: {window.name}",
            "boundary": window.boundary,
        }
        for column, (side, rule) in COLUMNS.items():
            estimates, seconds = found[side]
            scored = score(estimates, case.pricing, case.agreement, rule)
            row[column] = {**scored, "plans": len(estimates), "seconds": seconds}
        rows.append(row)
        print(
            f"  {number:>2} {window.source:<6} {window.boundary:>3} tokens: solved in "
            f"{found['ours'][1]:.1f} and {found['published'][1]:.1f} s, {len(case.agreement)} "
            f"plans judged, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )
    pairs = {
        "picked as each does": ("ours", "published"),
        "defaults, one judge": ("ours, counted", "published, planned"),
        "same states, one judge": ("ours, same states", "published, planned"),
    }
    summaries = {title: paired(rows, *pair) for title, pair in pairs.items()}
    print_summary(summaries)
    # Agreement out of sample: at the defaults, as each method picks its plans. Predicted speedup,
    # which is in sample: on the same states, by one predictor and one judge, because plans of 16
    # tokens are not fitted to the other 32, and 16 and 48 tokens are not shrunk alike.
    agreement = summaries["picked as each does"][OVERALL]
    speedup = summaries["same states, one judge"][PREDICTED]
    verdicts = [
        verdict(
            speedup.difference >= 0,
            f"{PREDICTED}, same states: {speedup.difference:+.4f}, at least 0",
        ),
        verdict(
            agreement.difference >= -MOST_AGREEMENT_LOST,
            f"{OVERALL}: {agreement.difference:+.4f}, at least {-MOST_AGREEMENT_LOST}",
        ),
    ]
    figures = {
        title: {name: asdict(pair) for name, pair in summary.items()}
        for title, summary in summaries.items()
    }
    references = {"reference_tokens": arguments.reference_tokens}
    write(arguments, "solver-quality", {**references, "against": figures, "texts": rows})
    return 0 if all(verdicts) or not arguments.check else 1


def paired(rows: list[dict[str, Any]], ours: str, other: str) -> dict[str, Paired]:
    """Every figure of two columns over the windows."""
    for row in rows:
        for column in COLUMNS:
            # nan as soon as one level is missing: such a window does not count.
            levels = [row[column][f"agreement at {level:.0%}"] for level in LEVELS]
            row[column][OVERALL] = statistics.fmean(levels)
    pair = (ours, other)
    names = [name for name in rows[0][ours] if all(name in row[c] for row in rows for c in pair)]
    return {
        name: Paired.of(*([row[column][name] for row in rows] for column in pair)) for name in names
    }


def print_summary(summaries: dict[str, dict[str, Paired]]) -> None:
    for title, summary in summaries.items():
        print(
            f"\n{title:<32}{'ours':>9}{'published':>11}{'difference':>12}{'s.e.':>9}{'windows':>9}"
        )
        for name, pair in sorted(summary.items()):
            print(
                f"{name:<32}{pair.ours:>9.4f}{pair.published:>11.4f}{pair.difference:>+12.4f}"
                f"{pair.standard_error:>9.4f}{pair.windows:>9}"
            )
    print(
        "As each does: each solver's plans picked by what it knows of them. One judge: both are\n"
        "picked and priced as our planner does, agreement counted in the same pass over the 48\n"
        "reference tokens of the published method; same states: ours searched on these too.\n"
        "agreement: top-1, out of sample, of the plan picked among those that save at least so\n"
        "much item time. speedup: at the best draft length of 1 to 8; predicted: with the\n"
        "agreement believed; choice: the same plan and length with out-of-sample agreement;\n"
        "known: the best, had that agreement been known.\n"
    )


def verdict(passed: bool, text: str) -> bool:
    print(f"{'pass' if passed else 'FAIL'}  {text}")
    return passed


def speed(arguments: argparse.Namespace) -> int:
    """Ours inside vLLM, over its modules and KV cache, as it serves; the oracle in plain torch."""
    session = Session(arguments)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with serving(arguments.dtype) as llm:
        for window in session.windows:
            case = session.case(window)
            runs = {
                "published": lambda _, case=case: case.published()[1],
                "ours": lambda solve, case=case: solve(case.pricing.weights),
            }

            def alternate(solve: Solve, runs: Any = runs) -> None:
                for run in runs.values():
                    run(solve)  # warm: the first solve of a shape is slower
                for number in range(arguments.rounds):
                    # Who goes first changes from round to round.
                    for side in SIDES if number % 2 else SIDES[::-1]:
                        seconds[side].append(runs[side](solve))

            at_first_round(llm, window.tokens[: window.boundary], alternate)
            print(
                f"  {window.boundary} tokens: "
                + ", ".join(
                    f"{side} {statistics.median(times[-arguments.rounds :]) * 1e3:.0f} ms"
                    for side, times in seconds.items()
                ),
                flush=True,
            )
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["published"], strict=True)]
    ratio = statistics.median(ratios)
    for side, times in seconds.items():
        print(
            f"{side}: median {statistics.median(times) * 1e3:.0f} ms, min {min(times) * 1e3:.0f} ms"
        )
    print(
        f"ratio: median {ratio:.1f}x ({min(ratios):.1f} to {max(ratios):.1f}), "
        f"of minima {min(seconds['published']) / min(seconds['ours']):.1f}x"
    )
    passed = verdict(ratio >= LEAST_SPEED_RATIO, f"{ratio:.1f}x, at least {LEAST_SPEED_RATIO}x")
    write(arguments, "solver-speed", {"seconds": seconds, "ratios": ratios, "ratio": ratio})
    return 0 if passed or not arguments.check else 1


COMMANDS = {"quality": (quality, 50), "speed": (speed, 3), "sweep": (sweep, 12)}
"""Function and default number of windows."""

if __name__ == "__main__":
    sys.exit(main())
