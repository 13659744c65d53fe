# SPDX-License-Identifier: Apache-2.0
"""Arguments of `knapspec bench`, and the types of arguments that other sub-commands share."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from knapspec_vllm.bench.arms import DEFAULT, NAMES, UsageError
from knapspec_vllm.bench.capacity import on_gpu
from knapspec_vllm.bench.workloads import WORKLOADS

#: vLLM's: "0" keeps the engine core in the process of vllm.LLM.
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"

DESCRIPTION = """\
Arms against plain vLLM as shipped, over batch x context x temperature. Every arm is an engine in a
process of its own; all stand side by side and take turns, one working at a time, so that whatever
else the machine does falls on all alike. Speed is that of decoding: prompts are in the prefix
cache, and the engine's time stamps leave out what is left of prefill. Partial results are kept.
Exit status: 0 fine, 1 failed or below --check, 2 wrong arguments, 130 interrupted."""
EXAMPLES = """\
examples:
  knapspec bench MODEL --batch 1 8 --context 512 8192 --out results
  knapspec bench MODEL --arms knapspec declining --arm wide='{"bins": 64}' --arm again=null
  knapspec bench --report results"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but --engine-args and --debug, which all sub-commands have."""
    parser.add_argument("model", nargs="?", help="model path or hub id")
    grid = parser.add_argument_group("grid")
    add = grid.add_argument
    add("--batch", type=positive, nargs="+", default=[1, 4], metavar="ROWS")
    add(
        "--context", type=positive, nargs="+", default=[256, 2048], metavar="TOKENS",
        help="prompt tokens of each row, exactly",
    )  # fmt: skip
    add("--temperature", type=_temperature, nargs="+", default=[0.0], metavar="T")

    compared = parser.add_argument_group("arms")
    add = compared.add_argument
    add(
        "--arms", nargs="+", default=list(DEFAULT), metavar="NAME",
        help=f"of {', '.join(NAMES)} (plain is always there); default: {' '.join(DEFAULT)}",
    )  # fmt: skip
    add(
        "--arm", action="append", default=[], metavar="NAME=JSON",
        help="an arm of your own: a speculative_config, KnapSpec settings (no \"method\" in it), "
        "or null for one more plain engine, which shows the noise; beside them \"engine_args\" and "
        "\"environment\" of this arm alone",
    )  # fmt: skip
    add(
        "--settings", type=json_object, default={}, metavar="JSON",
        help="KnapSpec settings of all arms that use it",
    )  # fmt: skip
    add("--num-speculative-tokens", type=positive, default=8, metavar="N", help="KnapSpec's arms")
    add("--store", type=Path, metavar="FOLDER", help="calibration store; default: an empty one")

    how = parser.add_argument_group("protocol")
    add = how.add_argument
    add("--workload", choices=WORKLOADS, default="mixed", help="text of the prompts")
    add(
        "--texts", choices=["fresh", "same"], default="fresh",
        help="fresh: other prompts every round. same: the same again, which is quicker for long "
        "contexts, but every adaptive arm then knows the text, and there is no ttft",
    )  # fmt: skip
    add("--rounds", type=positive, default=5, help="counted rounds of a cell")
    add(
        "--starts", type=positive, default=1, metavar="N",
        help="start every engine so many times and share the rounds among them: engines of one "
        "kind differ by some per cent from start to start, which more rounds do not show. From "
        "the second start on KnapSpec finds the first one's calibration",
    )  # fmt: skip
    add(
        "--turn", type=seconds, default=0.0, metavar="SECONDS",
        help="arms take turns of this length, and of five steps at least, in the middle of a batch "
        "(0.5 is a good one), so that all see the same of a machine whose speed moves, until the "
        "fastest is done; default: turns of a whole round. On CPUs, with "
        "VLLM_ENABLE_V1_MULTIPROCESSING=0",
    )  # fmt: skip
    add("--warm-up", type=_whole, default=1, metavar="ROUNDS", help="not counted, of every cell")
    add(
        "--requests", type=positive, default=2, metavar="N",
        help="requests of a round at least; smaller batches run several times",
    )  # fmt: skip
    add("--tokens", type=positive, default=128, metavar="N", help="output tokens of a request")
    add(
        "--natural-end", action="store_true",
        help="requests end at their end-of-text token, --tokens at most; default: equal work",
    )  # fmt: skip
    add("--eager", action="store_true", help="no compilation in any arm: not vLLM as shipped")
    add(
        "--at-once", type=positive, metavar="ENGINES",
        help="engines in memory together; default: as many as fit. With fewer than there are arms, "
        "each group of arms has a plain one of its own; with 1 no arm takes turns",
    )  # fmt: skip
    add("--timeout", type=positive, default=1800, metavar="SECONDS", help="of a start or a round")

    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--out", type=Path, default=Path("knapspec-bench"), metavar="FOLDER")
    add("--resume", action="store_true", help="keep what --out holds, measure what it lacks")
    add(
        "--check", type=float, metavar="MIN",
        help="exit status 1 if knapspec is below this ratio in any cell",
    )  # fmt: skip
    add("--report", type=Path, metavar="FOLDER", help="tables and plots from FOLDER; runs nothing")


def check(arguments: argparse.Namespace) -> None:
    """What argparse cannot see. Raises UsageError naming the option."""
    if arguments.report is not None:
        if arguments.model is not None:
            raise UsageError("--report runs nothing: leave out MODEL")
        return
    if arguments.model is None:
        raise UsageError("MODEL is missing (or --report FOLDER, to show results)")
    if arguments.tokens < 2:
        raise UsageError("--tokens 1 leaves nothing to decode: write 2 or more")
    if arguments.check is not None and "knapspec" not in arguments.arms:
        raise UsageError("--check judges the arm knapspec: add it to --arms")
    for name in ("speculative_config", "model"):
        if name in arguments.engine_args:
            raise UsageError(f"--engine-args: {name} is the benchmark's to set")
    if "store_dir" in arguments.settings:
        raise UsageError("--settings: write --store FOLDER instead of store_dir")
    if arguments.starts > arguments.rounds:
        raise UsageError(f"--starts {arguments.starts} needs as many --rounds at least")
    if arguments.turn:
        _check_turns()
    longest = arguments.engine_args.get("max_model_len")
    needed = max(arguments.context) + arguments.tokens
    if isinstance(longest, int) and longest < needed:
        raise UsageError(f"--context and --tokens need {needed} tokens, max_model_len is {longest}")


def _check_turns() -> None:
    if on_gpu():
        raise UsageError(
            "--turn: a GPU computes what its engine has queued while the engine stands still; "
            "leave it out"
        )
    if os.environ.get(IN_PROCESS) != "0":
        raise UsageError(
            f"--turn stops engines between two steps, which an engine core in a process of its own "
            f"does not tell: set {IN_PROCESS}=0"
        )


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def json_object(text: str) -> dict[str, Any]:
    """A mapping from JSON text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"a JSON object such as '{{\"key\": 1}}' is needed: {text}"
        )
    return value


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 0 or more")
    return number


def seconds(text: str) -> float:
    """A time of 0 or more."""
    return _number(text, "time in seconds")


def _temperature(text: str) -> float:
    return _number(text, "temperature")


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not a {what} of 0 or more")
    return value
