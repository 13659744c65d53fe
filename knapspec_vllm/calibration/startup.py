# SPDX-License-Identifier: Apache-2.0
"""Gives a proposer its cost curves before the server takes requests: stored ones, else measured."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

import torch

from knapspec_vllm import ops
from knapspec_vllm.calibration.budget import Budget
from knapspec_vllm.calibration.cells import measured_rows
from knapspec_vllm.calibration.faster import faster_attention, faster_head
from knapspec_vllm.calibration.profiler import measure, warm_up, warm_up_solver
from knapspec_vllm.calibration.steadiness import MOST_UNSTEADY, unsteadiness
from knapspec_vllm.calibration.store import (
    Calibration,
    CalibrationStore,
    fingerprint,
    hardware_name,
    store_directory,
)
from knapspec_vllm.config import leaves_no_choice
from knapspec_vllm.draft.graphs import CudaCapture
from knapspec_vllm.draft.memory import added_bytes
from knapspec_vllm.draft.proposer import KnapSpecProposer
from knapspec_vllm.draft.solve_graphs import Shape, SolveGraphs
from knapspec_vllm.planner.costs import CostModel, CostSample
from knapspec_vllm.planner.solver import SolverSettings
from knapspec_vllm.planner.types import Frontier

logger = logging.getLogger("vllm.knapspec")


def calibrate(proposer: KnapSpecProposer) -> None:
    """Load or measure, store, and start the proposer's planning. Every TP rank must call it.

    All ranks run the measurements (the forwards contain collectives); rank 0's numbers count.
    """
    engine, config, agreement = proposer.engine, proposer.config, proposer.agreement
    assert engine is not None
    store = _store_of(proposer)
    source, disturbed = "stored", None
    found = agreement.share(_stored(proposer, store))
    if found is not None:
        logger.info("KnapSpec uses the calibration stored in %s", store.path)
    elif config.calibration != "off" and not leaves_no_choice(config.plan, config.draft_length):
        (found, disturbed), source = _measure(proposer), "measured"
        if agreement.leads:
            _store(store, found, disturbed)

    def keep(frontier: Frontier) -> None:
        if found is not None and disturbed is None:
            store.save(dataclasses.replace(found, frontier=frontier))

    costs, frontier = None, None
    if found is not None:
        costs, frontier = found.costs, found.frontier
        if frontier is not None:
            frontier = dataclasses.replace(frontier, source="stored")
        if source == "stored":
            _take_over(proposer, found)
    elif config.draft_head == "auto":
        proposer.use_head("full")  # nobody has compared them
    solver = None
    if costs is not None and engine.device.type != "cpu":
        solver = _prepared_solver(proposer)
    if proposer.drafter.graphs is not None:
        proposer.drafter.graphs.clear()
    proposer.calibration = {
        "source": source if found is not None else "none",
        "hardware": hardware_name(),
        "attention": proposer.drafter.attention_path,
        "head": proposer.drafter.head.kind,
        "measured_at": None if found is None else found.measured_at,
        "path": str(store.path),
        "disturbed": disturbed,
    }
    proposer.memory_bytes = added_bytes(engine, config, proposer.num_speculative_tokens)
    proposer.use(costs, frontier, keep)
    assert proposer.planning is not None
    proposer.planning.solving.graphs = solver


def _store_of(proposer: KnapSpecProposer) -> CalibrationStore:
    """Where curves are kept of an engine like this one."""
    engine, config = proposer.engine, proposer.config
    assert engine is not None
    return CalibrationStore(
        store_directory(config.store_dir),
        fingerprint(
            engine.vllm_config,
            proposer.num_speculative_tokens,
            {
                "window_tokens": config.window_tokens,
                "sink_tokens": config.sink_tokens,
                "draft_attention": config.draft_attention,
                "draft_head": config.draft_head,
                "draft_graphs": proposer.drafter.graphs is not None,
            },
            {
                "attention": sorted({g.backend.get_name() for g in engine.attention_groups}),
                "asynchronous": engine.runs_ahead,
                "verify_graphs": len(proposer.verify_graphs),
                "rows": measured_rows(
                    engine.vllm_config.scheduler_config.max_num_seqs, engine.device
                )[-1],
            },
        ),
    )


def _stored(proposer: KnapSpecProposer, store: CalibrationStore) -> Calibration | None:
    """What of the store may be used; None on ranks that do not lead."""
    config = proposer.config
    if not proposer.agreement.leads or config.draft_length == 0 or config.calibration == "force":
        return None
    found = store.load()
    if found is not None and found.head == "screened" and proposer.screen is None:
        logger.warning("KnapSpec ignores %s: there is no screened head now", store.path)
        return None
    return found


def _take_over(proposer: KnapSpecProposer, found: Calibration) -> None:
    """Draft as when the curves were measured."""
    engine = proposer.engine
    assert engine is not None
    if engine.paged_kv:  # else our kernel cannot read the cache
        proposer.drafter.attention_path = found.attention_path
    proposer.use_head(found.head)
    warm_up(engine, proposer.drafter, engine.vllm_config.scheduler_config.max_num_seqs)


def _prepared_solver(proposer: KnapSpecProposer) -> SolveGraphs | None:
    """Everything of the solver compiled; and captured, where draft steps are."""
    engine, config = proposer.engine, proposer.config
    assert engine is not None
    solves = config.plan == "auto" and config.resolve and config.strategy == "knapspec"
    if not (solves and engine.paged_kv):
        return None
    start = time.perf_counter()
    settings, graphs = SolverSettings.of(config), None
    number, most_rows = config.reference_tokens * config.reference_rows, config.reference_rows
    try:
        warm_up_solver(engine, proposer.geometry, settings, number, most_rows)
        if proposer.drafter.graphs is not None:
            graphs = SolveGraphs(engine, proposer.geometry, settings, CudaCapture(engine.device))
            graphs.prepare(
                [
                    Shape(rows, number // rows, windows)
                    for rows in {1, most_rows}
                    for windows in {False, config.windows}
                ]
            )
    except ops.launch_errors() as error:
        if not proposer.agreement.alone:  # the other ranks wait in a collective of the solve
            raise
        logger.warning(
            "KnapSpec could not prepare its solver (%s) and runs it launch by launch; where memory "
            "is short, lower gpu_memory_utilization, live_branches or reference_tokens",
            error,
            exc_info=error,
        )
        graphs = None
    if graphs is None and engine.device.type == "cuda":
        torch.cuda.empty_cache()  # of captures that failed
    logger.info(
        "KnapSpec warmed its solver up in %.1f s, %d shapes of it captured",
        time.perf_counter() - start, len(graphs or ()),
    )  # fmt: skip
    return graphs


def _store(store: CalibrationStore, found: Calibration, disturbed: str | None) -> None:
    if disturbed is not None:
        logger.warning(
            "KnapSpec does not store its calibration, the next start measures anew: %s", disturbed
        )
        return
    store.save(found)
    logger.info("KnapSpec stored its calibration in %s", store.path)


def _measure(proposer: KnapSpecProposer) -> tuple[Calibration, str | None]:
    """And why it is not to be kept, if it is not."""
    engine = proposer.engine
    assert engine is not None
    start = time.perf_counter()
    max_rows = engine.vllm_config.scheduler_config.max_num_seqs
    if proposer.config.draft_attention == "auto":
        path = faster_attention(engine, proposer.drafter, max_rows)
        proposer.drafter.attention_path = proposer.agreement.share(path)
    if proposer.config.draft_head == "auto" and proposer.screen is not None:
        head = faster_head(engine, proposer.drafter, proposer.screen, max_rows)
        proposer.use_head(proposer.agreement.share(head))
    samples = measure(
        engine,
        proposer.drafter,
        proposer.num_speculative_tokens,
        max_rows,
        Budget(proposer.config.calibration_seconds, proposer.agreement),
    )
    model = CostModel.fit(samples, engine.view.num_layers, proposer.geometry.kept_tokens(1 << 30))
    logger.info(
        "KnapSpec measured %d cost samples in %.1f s", len(samples), time.perf_counter() - start
    )
    drafter = proposer.drafter
    found = Calibration(
        model, None, drafter.attention_path, drafter.head.kind, measured_at=time.time()
    )
    return proposer.agreement.share((found, _disturbed(samples)))


def _disturbed(samples: Sequence[CostSample]) -> str | None:
    """What rounds show will correct such curves; a later start may find the machine at rest."""
    factor = unsteadiness(samples)
    if factor is None or factor <= MOST_UNSTEADY:
        return None
    return (
        f"the machine was busy with something else while it measured, what it timed took "
        f"{factor:.1f} times as long as at its fastest"
    )
