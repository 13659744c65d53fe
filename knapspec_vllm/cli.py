# SPDX-License-Identifier: Apache-2.0
"""The `knapspec` command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from knapspec_vllm import __version__
from knapspec_vllm.bench import options
from knapspec_vllm.bench.options import json_object, positive
from knapspec_vllm.commands import calibrate, serve_args, top
from knapspec_vllm.commands.output import answers_only
from knapspec_vllm.commands.vllm_options import check_engine_args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 refused or failed, 2 wrong arguments, 130 interrupted."""
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.command != "doctor":  # which says so itself
            check_engine_args(getattr(arguments, "engine_args", {}))
        return int(arguments.run(arguments))
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"knapspec: {_first_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("knapspec: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Of the command with all its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="knapspec",
        description="KnapSpec self-speculative decoding for vLLM. To serve with it:\n"
        "  vllm serve MODEL --speculative-config "
        '\'{"method": "knapspec", "num_speculative_tokens": 8}\'',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"knapspec-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser(
        "doctor",
        help="what would be refused here, and why",
        description="Checks this installation and, with MODEL, whether KnapSpec can serve it. "
        "Loads no weights. Exit status 1 if something would be refused.",
    )
    doctor.add_argument("model", nargs="?", help="model path or hub id to check as well")
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    _add_engine_args(doctor)
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser(
        "plan",
        help="the plans KnapSpec would choose from, for given batches and context lengths",
        description="Starts the model in this process, calibrates or loads the stored curves, "
        "solves for plans on real text\nof every batch and context length, prints the frontier. "
        "Exit status: 0 printed, 1 failed, 2 wrong arguments.",
        epilog="examples:\n"
        "  knapspec plan MODEL --batch 1 8 --context 256 4096 --picture plans.png\n"
        "  knapspec plan MODEL --settings '{\"window_tokens\": 128}' --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("model", help="model path or hub id")
    plan.add_argument(
        "--batch", type=positive, nargs="+", default=[1], metavar="ROWS",
        help="requests decoded together (default: 1)",
    )  # fmt: skip
    plan.add_argument(
        "--context", type=positive, nargs="+", default=[256, 2048], metavar="TOKENS",
        help="context length of each row (default: 256 2048)",
    )  # fmt: skip
    plan.add_argument(
        "--num-speculative-tokens", type=positive, default=8, metavar="N",
        help="most tokens a round may draft (default: 8)",
    )  # fmt: skip
    plan.add_argument(
        "--settings", type=json_object, default={}, metavar="JSON",
        help='KnapSpec settings, as in --additional-config \'{"knapspec": JSON}\'',
    )  # fmt: skip
    plan.add_argument(
        "--most", type=positive, default=8, metavar="N",
        help="plans shown of each frontier, best first (default: 8)",
    )  # fmt: skip
    plan.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw the best plans")
    plan.add_argument("--json", action="store_true", help="machine-readable output")
    _add_engine_args(plan)
    plan.set_defaults(run=_plan)

    bench = commands.add_parser(
        "bench",
        help="KnapSpec and other methods against plain vLLM, measured",
        description=options.DESCRIPTION,
        epilog=options.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_arguments(bench)
    _add_engine_args(bench)
    bench.set_defaults(run=_bench)

    _add_engine_args(calibrate.add_parser(commands))
    _add_engine_args(serve_args.add_parser(commands))
    _add_debug(top.add_parser(commands))
    return parser


def _add_engine_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON",
        help='vLLM engine arguments, for example \'{"dtype": "float32", "enforce_eager": true}\'',
    )  # fmt: skip
    _add_debug(parser)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _doctor(arguments: argparse.Namespace) -> int:
    from knapspec_vllm.doctor import examine, worst

    checks = examine(arguments.model, arguments.engine_args)
    if arguments.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.status:<8} {check.name:<{width}}  {check.reason}")
            if check.advice:
                print(f"{'':<8} {'':<{width}}  -> {check.advice}")
    return int(worst(checks) == "refused")


def _plan(arguments: argparse.Namespace) -> int:
    from knapspec_vllm.bench.plan_report import format_table, plan_tables, save_picture

    with answers_only() as answer:
        tables = plan_tables(
            arguments.model,
            arguments.batch,
            arguments.context,
            arguments.engine_args,
            arguments.settings,
            arguments.num_speculative_tokens,
        )
        if arguments.json:
            text = json.dumps([table.as_dict() for table in tables], indent=1)
        else:
            text = "\n\n".join(format_table(table, arguments.most) for table in tables)
        print(text, file=answer)
    if arguments.picture is not None:
        save_picture(tables, arguments.picture)
        print(f"wrote {arguments.picture}", file=sys.stderr)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from knapspec_vllm.bench.command import run

    return run(arguments)


def _first_words(error: BaseException) -> str:
    """The error without pydantic's decoration."""
    from knapspec_vllm.doctor import sentences

    return " ".join(sentences(error)) or f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
