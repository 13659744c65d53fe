# SPDX-License-Identifier: Apache-2.0
"""`knapspec calibrate`: measure cost curves and solve for plans before anybody waits for them."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knapspec_vllm.bench.options import json_object, positive
from knapspec_vllm.commands.output import answers_only, under_way
from knapspec_vllm.commands.vllm_options import serve_options
from knapspec_vllm.config import leaves_no_choice

if TYPE_CHECKING:
    from knapspec_vllm.planner.costs import CostModel

DESCRIPTION = """\
Starts the model as a server would, measures its cost curves, solves for plans on text, and stores
both. A server with the same model, options, hardware and versions then starts with them and says
"KnapSpec uses the calibration stored in ...". Give it the options of that server: what differs
(--max-model-len, --max-num-seqs below 32 or, on a GPU, 256, --tensor-parallel-size, --dtype,
num_speculative_tokens, ...) is measured anew.
Nothing is stored of a machine that was busy with something else.
Exit status: 0 stored, 1 failed, 2 wrong arguments."""
EXAMPLES = """\
examples:
  knapspec calibrate MODEL --serve-config serve.yaml
  knapspec calibrate MODEL --engine-args '{"tensor_parallel_size": 4}' --store /cache/knapspec
  knapspec calibrate MODEL --serve-config serve.yaml --ray     # once per kind of node"""


@dataclass(frozen=True)
class Price:
    """What a batch costs, milliseconds."""

    batch: int
    context: int
    step_ms: float
    """A plain decode step."""
    verify_ms: float
    """A step that verifies the longest draft."""
    draft_ms: float
    """A draft forward of everything."""
    window_ms: float
    """The same with every attention in a window."""
    empty_ms: float
    """A draft forward without any item: embedding, head, overheads."""


@dataclass(frozen=True)
class Report:
    """What was measured, and where it is."""

    hardware: str
    path: str
    seconds: float
    num_speculative_tokens: int
    prices: tuple[Price, ...]
    plans: int
    """On the stored frontier."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, obj: dict[str, Any]) -> Report:
        return cls(**{**obj, "prices": tuple(Price(**price) for price in obj["prices"])})


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="measure and store cost curves and plans ahead of time",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="model path or hub id")
    add(
        "--serve-config", type=Path, metavar="FILE.yaml",
        help="the file that the server gets as vllm serve --config",
    )  # fmt: skip
    add("--num-speculative-tokens", type=positive, metavar="N", help="default: the file's, or 8")
    add(
        "--settings", type=json_object, default={}, metavar="JSON",
        help='KnapSpec settings over the file\'s, such as \'{"window_tokens": 1024}\'',
    )  # fmt: skip
    add("--store", metavar="FOLDER", help="calibration store; default: the server's default")
    add(
        "--batch", type=positive, nargs="+", default=[1, 8], metavar="ROWS",
        help="batches whose prices are printed (default: 1 8); curves are measured over all",
    )  # fmt: skip
    add(
        "--context", type=positive, nargs="+", default=[512, 4096], metavar="TOKENS",
        help="context lengths whose prices are printed (default: 512 4096); plans are solved for "
        "one row of the longest that the engine has room for",
    )  # fmt: skip
    add(
        "--ray", action="store_true",
        help="once on a node of every kind in the Ray cluster (RAY_ADDRESS, or the local one); "
        "all results go into the store here",
    )  # fmt: skip
    add("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    with answers_only() as answer:
        reports = _reports(arguments)
        if arguments.json:
            text = json.dumps([report.as_dict() for report in reports], indent=1)
        else:
            text = "\n\n".join(format_report(report) for report in reports)
        print(text, file=answer)
    return 0


def _reports(arguments: argparse.Namespace) -> list[Report]:
    options = engine_options(arguments)
    if not arguments.ray:
        return [calibrate(arguments.model, options, arguments.batch, arguments.context)]
    from knapspec_vllm.commands.fleet import calibrate_fleet

    return calibrate_fleet(arguments.model, options, arguments.batch, arguments.context)


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM: the server's file, then the command line over it."""
    options = serve_options(arguments.serve_config) if arguments.serve_config else {}
    options.update(arguments.engine_args)
    speculative = dict(options.pop("speculative_config", None) or {})
    if speculative.get("method", "knapspec") != "knapspec":
        raise ValueError(
            f"--serve-config selects the method {speculative['method']!r}; there is nothing to "
            'calibrate for it: write "method": "knapspec" in it'
        )
    speculative |= {"method": "knapspec", **arguments.settings}
    count = arguments.num_speculative_tokens or speculative.get("num_speculative_tokens") or 8
    speculative["num_speculative_tokens"] = count
    if arguments.store is not None:
        speculative["store_dir"] = arguments.store
    additional = dict(options.pop("additional_config", None) or {})
    # Of the two places for settings the command line's wins. The last two are what this is for.
    own = additional.pop("knapspec", None) or {}
    speculative = {**own, **speculative, "calibration": "force", "resolve": True}
    length = speculative.get("draft_length")
    if leaves_no_choice(speculative.get("plan", "auto"), length):
        raise ValueError(
            f"draft_length={length} leaves nothing to choose, so nothing is measured for it: "
            "leave draft_length out of --settings and --serve-config"
        )
    return {
        **options,
        "speculative_config": speculative,
        **({"additional_config": additional} if additional else {}),
    }


def calibrate(
    model: str, options: dict[str, Any], batches: Sequence[int], contexts: Sequence[int]
) -> Report:
    """Measure, solve and store, in an engine that this process starts.

    options: keyword arguments of vllm.LLM that select KnapSpec. Plans are solved for one row of
    the longest context of those given that the engine has room for.
    """
    # As a server's, the engine is a process of its own: on a CPU it has other threads then, and
    # curves of other threads are other curves.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    from knapspec_vllm.bench.inspection import knapspec_costs, request_solve
    from knapspec_vllm.bench.plan_report import reference_tokens
    from knapspec_vllm.planner.costs import CostModel
    from knapspec_vllm.planner.types import Frontier

    start = time.perf_counter()
    with under_way(f"starting {model} and measuring its cost curves"):
        llm = LLM(model=model, **options)
    try:
        count = options["speculative_config"]["num_speculative_tokens"]
        config = llm.llm_engine.vllm_config
        room = config.model_config.max_model_len - count - 4
        context = max([c for c in contexts if c <= room] or [room])
        prompt = {"prompt_token_ids": reference_tokens(llm, context)}
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        with under_way(f"solving for plans (batch 1, context {context})"):
            llm.collective_rpc(request_solve)
            llm.generate([prompt], params, use_tqdm=False)
        found = json.loads(llm.collective_rpc(knapspec_costs)[0])
        rows = [b for b in batches if b <= config.scheduler_config.max_num_seqs] or [1]
    finally:
        llm.llm_engine.engine_core.shutdown()
    if found is None:
        raise RuntimeError("the engine measured nothing: see its log above")
    calibration = found["calibration"]
    if calibration["disturbed"] is not None:
        raise RuntimeError(
            f"nothing was stored: {calibration['disturbed']}; run it again when the machine is idle"
        )
    if found["frontier"] is None and options["speculative_config"].get("plan", "auto") == "auto":
        raise RuntimeError(
            f"no plans were found on {context} tokens of context, too few: write a larger --context"
        )
    costs = CostModel.from_json(found["costs"])
    frontier = None if found["frontier"] is None else Frontier.from_json(found["frontier"])
    return Report(
        hardware=calibration["hardware"],
        path=calibration["path"],
        seconds=time.perf_counter() - start,
        num_speculative_tokens=count,
        prices=tuple(
            _price(costs, batch, min(context, room), count)
            for batch in rows
            for context in sorted({min(c, room) for c in contexts})
        ),
        plans=0 if frontier is None else len(frontier.estimates),
    )


def _price(costs: CostModel, rows: int, context: int, draft_length: int) -> Price:
    from knapspec_vllm.planner.types import Batch, Mode, Plan

    batch = Batch(rows, rows * context)
    layers = costs.num_layers

    def draft_ms(attention: Mode, mlp: Mode) -> float:
        return costs.draft_us(Plan((attention, mlp) * layers), batch) / 1e3

    return Price(
        batch=rows,
        context=context,
        step_ms=costs.step_us(batch, 1) / 1e3,
        verify_ms=costs.step_us(batch, 1 + draft_length) / 1e3,
        draft_ms=draft_ms(Mode.FULL, Mode.FULL),
        window_ms=draft_ms(Mode.WINDOW, Mode.FULL),
        empty_ms=draft_ms(Mode.SKIP, Mode.SKIP),
    )


def format_report(report: Report) -> str:
    """The curves at some batches, as a table of milliseconds."""
    verify = f"verify {report.num_speculative_tokens + 1}"
    lines = [
        f"{report.hardware}: measured in {report.seconds:.0f} s, {report.plans} plans, stored in",
        f"  {report.path}",
        f"  {'batch':>5} {'context':>7} {'step':>8} {verify:>9} {'draft':>8} {'windowed':>8} "
        f"{'no item':>8}   ms",
    ]
    for price in report.prices:
        lines.append(
            f"  {price.batch:>5} {price.context:>7} {price.step_ms:>8.1f} {price.verify_ms:>9.1f} "
            f"{price.draft_ms:>8.1f} {price.window_ms:>8.1f} {price.empty_ms:>8.1f}"
        )
    return "\n".join(lines)
