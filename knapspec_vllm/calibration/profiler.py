# SPDX-License-Identifier: Apache-2.0
"""Times target steps and draft forwards on the running engine, before it serves.

The KV cache is allocated and still empty, so any block may be used: rows get block tables spread
over the cache, and what the measurements write is never visible to a request. Draft forwards are
timed as they will run, through the drafter: replayed where they are captured, else Python and
metadata included. The target's steps replay vLLM's own graphs where it would (`draft.target`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from knapspec_vllm.calibration.budget import Budget
from knapspec_vllm.calibration.cells import Cell, cells_of
from knapspec_vllm.draft.branches import VllmBranches
from knapspec_vllm.draft.drafter import Drafter
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.metadata import StepMetadata
from knapspec_vllm.draft.references import References
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.draft.target import Forward
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.planner.costs import CostSample
from knapspec_vllm.planner.solver import ItemWeights, SolverSettings, start_solve
from knapspec_vllm.planner.types import Mode, Plan

logger = logging.getLogger("vllm.knapspec")

#: Timed repetitions of a cell after one warm-up; the model fit takes the median.
_REPEATS = 3
_AHEAD = 4
"""Queued behind one another where the server's steps are too: what the host needs for them is then
hidden, as long as the device needs more."""

Work = Callable[[], tuple[torch.Tensor, ...]]
"""A step's work; gives what its round reads back from the device."""


def measure(
    engine: Engine,
    drafter: Drafter,
    num_speculative_tokens: int,
    max_rows: int,
    budget: Budget,
) -> list[CostSample]:
    """Cost samples of as many cells as the budget allows, the most useful ones first.

    The first cell is always measured, because nothing can be priced without it, but once half the
    budget is gone each of its shapes is timed only once. Ends as well where memory does.
    """
    cells = list(cells_of(engine, num_speculative_tokens, max_rows))
    samples: list[CostSample] = []
    for done, cell in enumerate(cells):
        if not budget.allows(done):
            break
        try:
            samples.extend(_measure_cell(engine, drafter, num_speculative_tokens, cell, budget))
        except torch.OutOfMemoryError as error:
            if not samples or not budget.alone:  # other ranks wait in a collective of the step
                raise
            torch.cuda.empty_cache()
            logger.warning(
                "KnapSpec had no memory to measure batch %d, context %d (%s): prices of batches "
                "like it are extrapolated", cell.rows, cell.context, error,
            )  # fmt: skip
            break
        logger.info(
            "KnapSpec calibration: batch %d, context %d (%d of %d shapes, %.1f of %.0f s)",
            cell.rows, cell.context, done + 1, len(cells), budget.spent, budget.seconds,
        )  # fmt: skip
    return samples


@torch.inference_mode()
def warm_up(engine: Engine, drafter: Drafter, max_rows: int) -> None:
    """One draft forward of every kind, of one row and of many.

    The first of a shape takes several times as long (libraries prepare their kernels), and a server
    that starts from stored curves would count that against drafting.
    """
    cells = list(cells_of(engine, 1, max_rows))
    for cell in {cells[0], cells[-1]}:
        rows = fake_rows(engine, cell, 1)
        for plan in uniform_plans(engine.view.num_layers).values():
            draft_step(drafter, plan, rows, 1, captured=False)()


@torch.inference_mode()
def warm_up_solver(
    engine: Engine, geometry: WindowGeometry, settings: SolverSettings, number: int, most_rows: int
) -> None:
    """Solves of one row and of `most_rows`, over short contexts and long ones, with windows and
    without; number: of reference tokens.

    Triton compiles a kernel when it is first launched: without this the first solve of a server
    held its requests for 12 s (H200, 8B).
    """
    cells = list(cells_of(engine, 1, most_rows))
    most_rows = max(cell.rows for cell in cells)
    for cell in (cell for cell in cells if cell.rows in (1, most_rows)):
        rows = fake_rows(engine, cell, 1)
        count = min(number // cell.rows, cell.context - 1)
        references = References(
            tokens=rows.tokens.repeat_interleave(count),
            starts=rows.positions + 1 - count,
            block_table=rows.block_table,
            max_start=cell.context - count,
        )
        for window_us in (1.0, 0.5):
            start_solve(
                VllmBranches(engine, geometry, references),
                ItemWeights(1.0, window_us, 1.0),
                settings,
            ).result()


def uniform_plans(num_layers: int) -> dict[str, Plan]:
    """The plans whose differences price the items, by sample kind."""

    def plan(attention: Mode, mlp: Mode) -> Plan:
        return Plan((attention, mlp) * num_layers)

    return {
        "draft_full": plan(Mode.FULL, Mode.FULL),
        "draft_window": plan(Mode.WINDOW, Mode.FULL),
        "draft_no_attention": plan(Mode.SKIP, Mode.FULL),
        "draft_no_mlp": plan(Mode.FULL, Mode.SKIP),
        "draft_empty": plan(Mode.SKIP, Mode.SKIP),
    }


@torch.inference_mode()
def _measure_cell(
    engine: Engine, drafter: Drafter, num_speculative_tokens: int, cell: Cell, budget: Budget
) -> list[CostSample]:
    rows = fake_rows(engine, cell, num_speculative_tokens)
    metadata = StepMetadata(engine)
    samples: list[CostSample] = []

    def sample(kind: str, tokens_per_row: int, run: Work) -> None:
        context = cell.rows * cell.context
        samples.extend(
            CostSample(kind, cell.rows, tokens_per_row, context, taken_us)
            for taken_us in time_us(engine, run, budget.half_gone)
        )

    verify = sorted({1, 2, 1 + (num_speculative_tokens + 1) // 2, 1 + num_speculative_tokens})
    for tokens_per_row in verify:
        with engine.target.step(metadata, rows, tokens_per_row) as forward:
            sample(
                "step", tokens_per_row, _target_step(engine, forward, cell.rows * tokens_per_row)
            )
    for kind, plan in uniform_plans(engine.view.num_layers).items():
        sample(kind, 1, draft_step(drafter, plan, rows, num_speculative_tokens))
    return samples


def draft_step(
    drafter: Drafter, plan: Plan, rows: DraftRows, draft_length: int, captured: bool = True
) -> Work:
    """One step of a draft; gives its rows' tokens and counts.

    captured: as rounds come to run it, where draft steps are captured.
    """
    step_of = drafter.captured(plan, len(rows), measured=True) if captured else None
    started = drafter.start(plan, draft_length, rows, step_of)
    state = started.state

    def run() -> tuple[torch.Tensor, ...]:
        with started.steps() as step:
            step()
        return state.tokens, state.counts

    return run


def _target_step(engine: Engine, forward: Forward, tokens: int) -> Work:
    """Logits and argmax for all its tokens, as verification needs them."""

    def run() -> tuple[torch.Tensor, ...]:
        return (engine.view.logits(forward()[:tokens]).argmax(dim=-1),)

    return run


def time_us(engine: Engine, run: Work, hurry: Callable[[], bool] = lambda: False) -> list[float]:
    """Microseconds of each repetition after a first one; in a hurry there is a single one, and the
    faster of it and the first: a lone slow moment would be the shape's price."""
    first = once_us(engine, run, queued=1)
    times: list[float] = []
    while len(times) < _REPEATS and (not times or not hurry()):
        times.append(once_us(engine, run))
    return times if len(times) > 1 else [min(first, *times)]


def once_us(engine: Engine, run: Work, queued: int = _AHEAD) -> float:
    """Microseconds until the host has what it gives; where the host runs ahead of the device, of
    one of `queued` in a row, none of which is read."""
    engine.synchronize()
    start = time.perf_counter()
    if engine.runs_ahead:
        for _ in range(queued):
            run()
    else:
        queued = 1
        for values in run():
            values.tolist()
    engine.synchronize()
    return (time.perf_counter() - start) * 1e6 / queued


def fake_rows(engine: Engine, cell: Cell, num_speculative_tokens: int) -> DraftRows:
    """Rows at position context - 1 with disjoint block tables where the cache is large enough."""
    per_row = -(-(cell.context + num_speculative_tokens + 1) // engine.block_size)
    blocks = torch.arange(cell.rows * per_row, dtype=torch.int32) % (engine.num_blocks - 1) + 1
    position = cell.context - 1
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    tokens = torch.arange(cell.rows, dtype=torch.int64) * 7919 % vocabulary
    return DraftRows(
        index=list(range(cell.rows)),
        req_ids=[f"calibration-{i}" for i in range(cell.rows)],
        tokens=tokens.to(engine.device),
        positions=torch.full((cell.rows,), position, device=engine.device),
        host_positions=[position] * cell.rows,
        limits=[num_speculative_tokens] * cell.rows,
        block_table=blocks.view(cell.rows, per_row).to(engine.device),
    )
