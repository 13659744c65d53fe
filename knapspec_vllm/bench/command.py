# SPDX-License-Identifier: Apache-2.0
"""`knapspec bench`: arms against plain vLLM over a grid of batches, contexts and temperatures."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from knapspec_vllm.bench import capacity, options, tables
from knapspec_vllm.bench.arms import Arm, UsageError, make_arms
from knapspec_vllm.bench.engines import Engine
from knapspec_vllm.bench.figures import Figures, all_figures, save
from knapspec_vllm.bench.grid import Protocol, measure_grid
from knapspec_vllm.bench.plots import save_plots
from knapspec_vllm.bench.provenance import provenance
from knapspec_vllm.bench.results import FILE, Cell, Measurement, Results
from knapspec_vllm.bench.workloads import Workload

_MAX_SEQS = 256  # vLLM's smallest default


def run(arguments: argparse.Namespace) -> int:
    """Exit status, see `options.DESCRIPTION`."""
    try:
        options.check(arguments)
        if arguments.report is not None:
            return report(arguments.report, arguments.check)
        return Benchmark(arguments).run()
    except UsageError as error:
        print(f"knapspec bench: {error}", file=sys.stderr)
        return 2


def report(folder: Path, minimum: float | None = None) -> int:
    """Tables and plots of the results in `folder`; also redraws its CSV."""
    results = Results.load(folder)
    rows = save(results, folder)
    _show(results, rows)
    return _finish(results, rows, folder, minimum)


class Benchmark:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        arms, left_out = make_arms(
            arguments.arms, arguments.arm, arguments.settings, arguments.num_speculative_tokens
        )
        self._arms = {arm.name: arm for arm in arms}
        self._protocol = Protocol(
            rounds=arguments.rounds,
            warm_up=arguments.warm_up,
            tokens=arguments.tokens,
            requests=arguments.requests,
            natural_end=arguments.natural_end,
            starts=arguments.starts,
            turn=arguments.turn,
        )
        local = Path(arguments.model).is_dir()
        self._environment = {"HF_HUB_OFFLINE": "1"} if local else {}
        cells = [
            Cell(batch, context, temperature)
            for temperature in dict.fromkeys(arguments.temperature)
            for context in dict.fromkeys(arguments.context)
            for batch in dict.fromkeys(arguments.batch)
        ]
        fresh = Results(
            provenance=provenance(),
            settings=_settings(arguments),
            arms={arm.name: arm.described() for arm in arms},
            left_out=left_out,
            cells=cells,
        )
        self._results = _merged(fresh, arguments.out, arguments.resume)

    def run(self) -> int:
        """Measure, save, show; what was measured before an interruption is kept."""
        arguments, results = self._arguments, self._results
        for name, reason in results.left_out.items():
            _say(f"left out: {name}, {reason}")
        tokenizer, config = _tokenizer_and_config(arguments.model, arguments.engine_args)
        workload = Workload(arguments.workload, tokenizer)
        self._check_prompts(workload)
        at_once, kv_gib = self._capacity(config)

        def prompts(cell: Cell, number: int) -> list[list[int]]:
            series = str(cell) + (f" {number}" if arguments.texts == "fresh" else "")
            return workload.prompts(self._protocol.rows(cell), cell.context, series)

        def after_cell(cell: Cell, found: list[Measurement]) -> None:
            rows = [r for r in save(results, arguments.out) if _is_of(r, cell)]
            _say("\n" + tables.cell_table(rows) + "\n")

        with _leaving_on_signals(), tempfile.TemporaryDirectory(prefix="knapspec-store-") as store:
            # All KnapSpec arms plan with the same curves: the first to start measures them.
            folder = str(arguments.store.resolve()) if arguments.store else store

            def make_engines(names: Sequence[str]) -> list[Engine]:
                return [self._engine(self._arms[name], at_once, kv_gib, folder) for name in names]

            try:
                save(results, arguments.out)
                measure_grid(
                    results, self._protocol, at_once, make_engines, prompts, after_cell, _say
                )
            except KeyboardInterrupt:
                _say(f"\ninterrupted: whole cells are in {arguments.out}; --resume goes on")
                return 130
        rows = all_figures(results)
        _show(results, rows)
        return _finish(results, rows, arguments.out, arguments.check)

    def _check_prompts(self, workload: Workload) -> None:
        """Before anything is started: every context can be cut from this text."""
        for cell in self._results.cells:
            workload.prompts(self._protocol.rows(cell), cell.context)

    def _capacity(self, config: Any) -> tuple[int, int]:
        """(engines at once, GiB of KV cache on a CPU)."""
        arguments, engine_args = self._arguments, self._arguments.engine_args
        length = max(cell.context for cell in self._results.cells) + arguments.tokens
        batch = max(cell.batch for cell in self._results.cells)
        kv = capacity.kv_bytes(config, batch, length, str(engine_args.get("dtype", "auto")))
        gpus = int(engine_args.get("tensor_parallel_size", 1))
        at_once = arguments.at_once or capacity.engines_at_once(
            len(self._arms), capacity.weight_bytes(arguments.model), kv, gpus
        )
        share = engine_args.get("gpu_memory_utilization")
        if share and arguments.at_once is None and capacity.on_gpu():
            at_once = max(1, min(at_once, int(1.0 / share)))
        at_once = min(at_once, len(self._arms))
        if at_once < len(self._arms):
            _say(f"{at_once} of {len(self._arms)} engines at a time (--at-once says how many)")
        return at_once, capacity.kv_space_gib(kv)

    def _engine(self, arm: Arm, at_once: int, kv_gib: int, store: str) -> Engine:
        arguments = self._arguments
        cells = self._results.cells
        settings: dict[str, Any] = {
            "model": arguments.model,
            # vLLM drafts nothing for rows that come within a draft of the limit.
            "max_model_len": max(c.context for c in cells) + arguments.tokens + 16,
        }
        environment = {**self._environment, **arm.environment}
        if max(cell.batch for cell in cells) > _MAX_SEQS:
            settings["max_num_seqs"] = max(cell.batch for cell in cells)
        if arguments.eager:
            settings["enforce_eager"] = True
        if capacity.on_gpu():
            if at_once > 1:
                share = capacity.GPU_MEMORY_UTILIZATION / at_once
                settings["gpu_memory_utilization"] = round(share, 3)
        else:
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_gib))
        settings.update({**arguments.engine_args, **arm.engine_args})
        if arm.speculative is not None:
            own = {"store_dir": store} if arm.is_knapspec else {}
            settings["speculative_config"] = {**own, **arm.speculative}
        return Engine(arm.name, settings, environment, arguments.timeout)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all cells of a run have in common."""
    names = (
        "workload", "texts", "rounds", "starts", "turn", "warm_up", "requests", "tokens",
        "natural_end", "eager", "engine_args",
    )  # fmt: skip
    model = Path(arguments.model).name if Path(arguments.model).is_dir() else arguments.model
    return {"model": model, **{name: getattr(arguments, name) for name in names}}


def _merged(fresh: Results, folder: Path, resume: bool) -> Results:
    """`fresh`, with what the folder holds if that may go on."""
    if not (folder / FILE).exists():
        return fresh
    if not resume:
        raise UsageError(f"--out {folder} holds results: add --resume, or write another folder")
    kept = Results.load(folder)
    kept.check_same(fresh)
    kept.arms.update({n: arm for n, arm in fresh.arms.items() if n not in kept.arms})
    kept.left_out = {n: r for n, r in fresh.left_out.items() if n not in kept.arms}
    kept.cells += [cell for cell in fresh.cells if cell not in kept.cells]
    return kept


def _tokenizer_and_config(model: str, engine_args: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    transformers.logging.set_verbosity_error()  # texts are longer than models like
    names = ("trust_remote_code", "revision")
    shared = {name: engine_args[name] for name in names if name in engine_args}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            engine_args.get("tokenizer", model), **shared
        )
        return tokenizer, transformers.AutoConfig.from_pretrained(model, **shared)
    except (OSError, ValueError) as error:
        raise UsageError(f"MODEL {model}: {str(error).splitlines()[0]}") from None


def _show(results: Results, rows: Sequence[Figures]) -> None:
    parts = [tables.header(results), tables.tables(rows), tables.notes()]
    _say("\n" + "\n\n".join([*(p for p in parts if p), tables.summary(rows, results)]))


def _finish(results: Results, rows: Sequence[Figures], folder: Path, minimum: float | None) -> int:
    try:
        _say("\nwrote " + ", ".join(path.name for path in save_plots(results, rows, folder)))
    except RuntimeError as error:  # no matplotlib: the numbers are there all the same
        print(f"knapspec bench: {error}", file=sys.stderr)
    return int(minimum is not None and not passes(rows, minimum))


def passes(rows: Sequence[Figures], minimum: float) -> bool:
    """Whether the arm knapspec reaches this ratio in every cell it was measured in."""
    judged = [row for row in rows if row.arm == "knapspec" and row.ratio is not None]
    below = [row for row in judged if (row.ratio or 0.0) < minimum]
    for row in below:
        where = Cell(row.batch, row.context, row.temperature)
        _say(f"--check: {row.ratio:.3f}x is below {minimum:g}x at {where}")
    if not judged:
        _say("--check: knapspec was not measured")
    return bool(judged) and not below


def _is_of(row: Figures, cell: Cell) -> bool:
    return (row.batch, row.context, row.temperature) == (cell.batch, cell.context, cell.temperature)


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the engines as Ctrl-C does."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, flush=True)
