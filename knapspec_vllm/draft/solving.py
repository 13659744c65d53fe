# SPDX-License-Identifier: Apache-2.0
"""Runs the solver, or a published planner in its place, when the policy asks for plans."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.draft.agreement import Agreement
from knapspec_vllm.draft.branches import VllmBranches
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.references import References
from knapspec_vllm.draft.solve_graphs import SolveGraphs
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner import baselines
from knapspec_vllm.planner.pending_solve import PendingSolve
from knapspec_vllm.planner.policy import Policy
from knapspec_vllm.planner.solver import ItemWeights, SolverSettings, start_solve
from knapspec_vllm.planner.types import Batch, Frontier, Mode, PlanEstimate

logger = logging.getLogger("vllm.knapspec")


@dataclass(frozen=True)
class _Solved:
    """What a strategy found; it has waited for the device itself."""

    estimates: tuple[PlanEstimate, ...]
    time_us: float

    @property
    def host_us(self) -> float:
        return self.time_us

    def ready(self) -> bool:
        return True

    def result(self) -> tuple[PlanEstimate, ...]:
        return self.estimates


@dataclass(frozen=True)
class _Pending:
    """A solve that has not come back, and what it was for."""

    solve: PendingSolve | _Solved
    batch: Batch
    described: str


class Solving:
    """At most one solve at a time; every tensor-parallel rank takes part, rank 0 decides."""

    def __init__(
        self,
        config: KnapSpecConfig,
        engine: Engine,
        geometry: WindowGeometry,
        agreement: Agreement,
        stats: Stats,
        on_frontier: Callable[[Frontier], None],
    ) -> None:
        """on_frontier: receives, on rank 0, every frontier found."""
        self._config = config
        self._engine = engine
        self._geometry = geometry
        self._agreement = agreement
        self._stats = stats
        self._on_frontier = on_frontier
        self.strategy = None if config.strategy == "knapspec" else baselines.make(config.strategy)
        #: Of KnapSpec's own solver; None: launch by launch.
        self.graphs: SolveGraphs | None = None
        #: Solve in the next round, whatever the policy thinks; to be set on every rank.
        self.requested = False
        #: One was due, but nobody gave tokens to judge plans on.
        self.lacks_references = False
        self._since: int | None = None
        """Rounds since a strategy's last solve."""
        self._out_of_memory = False
        self._pending: _Pending | None = None
        self._started: PendingSolve | _Solved | None = None

    @property
    def reference_tokens(self) -> int:
        """How many committed tokens, over all rows, plans are judged on."""
        if self.strategy is not None:
            return self.strategy.reference_tokens
        return self._config.reference_tokens * self._config.reference_rows

    @property
    def under_way(self) -> bool:
        """Whether the device may be busy with a solve."""
        return self._pending is not None

    def take_started(self) -> PendingSolve | _Solved | None:
        """The solve that was queued since this was asked last."""
        started, self._started = self._started, None
        return started

    def start(
        self, policy: Policy, batch: Batch, references: Callable[[], References | None]
    ) -> None:
        """Queue a solve if one is due and a row is long enough."""
        if self._out_of_memory:
            self.requested = False
        if self._pending is not None or self._out_of_memory:
            return
        reason = "requested" if self.requested else None
        if reason is None and self._agreement.leads:
            reason = self._reason(policy, batch)
        reason = self._agreement.share(reason)
        # Same on every rank: derived from the scheduler's output only.
        found = None if reason is None else references()
        self.lacks_references = reason is not None and found is None
        if found is None:
            return
        self.requested = False
        try:
            solve = self._solve(policy, batch, found)
        except torch.OutOfMemoryError:
            if not self._agreement.alone:  # the other ranks wait in a collective of the solve
                raise
            self._out_of_memory = True
            logger.warning(
                "KnapSpec ran out of memory while solving and solves no more: lower "
                "gpu_memory_utilization, live_branches or reference_tokens"
            )
            return
        context = f"{reason}; batch {batch.rows}, context {batch.context_per_row:.0f}"
        self._pending = _Pending(solve, batch, f"{context}, {len(found.tokens)} reference tokens")
        self._started = solve

    def collect(self, policy: Policy) -> None:
        """Install the frontier of a solve that has come back from the device; never waits."""
        if self._pending is None:
            return
        solve, batch = self._pending.solve, self._pending.batch
        if not self._agreement.share(solve.ready() if self._agreement.leads else None):
            return
        # Rank 0 alone has asked whether its device is done; a time needs that as well.
        found = (solve.result(), solve.time_us) if self._agreement.leads else ((), 0.0)
        estimates, time_us = self._agreement.share(found)
        frontier = Frontier(estimates, batch.context_tokens, batch.rows, "solved")
        # A solve that finds nothing (a state that overflowed, say) takes no plans away.
        if estimates or policy.frontier is None:
            policy.set_frontier(frontier)
        policy.note_solve(time_us, bool(estimates))
        self._stats.add_solve(time_us, solve.host_us)
        logger.info(
            "KnapSpec solved %d plans in %.0f ms (%s)",
            len(estimates), time_us / 1e3, self._pending.described,
        )  # fmt: skip
        self._pending = None
        if self._agreement.leads and estimates:
            self._on_frontier(frontier)

    def _reason(self, policy: Policy, batch: Batch) -> str | None:
        if self.strategy is None:
            return policy.resolve_reason(batch, True)
        if self._since is None:
            return "first"
        self._since += 1
        every = self.strategy.resolve_every
        return "age" if every is not None and self._since >= every else None

    def _solve(
        self, policy: Policy, batch: Batch, references: References
    ) -> PendingSolve | _Solved:
        costs, config = policy.costs, self._config
        weights = self._agreement.share(
            ItemWeights(
                attention_full_us=costs.item_us("attention", Mode.FULL, batch),
                attention_window_us=costs.item_us("attention", Mode.WINDOW, batch),
                mlp_us=costs.item_us("mlp", Mode.FULL, batch),
                fixed_us=costs.fixed_us(batch),
            )
        )
        settings = SolverSettings.of(config)
        with torch.inference_mode():
            if self.graphs is not None:
                captured = self.graphs.start(references, weights)
                if captured is not None:
                    return captured
            runner = VllmBranches(self._engine, self._geometry, references)
            if self.strategy is None:
                return start_solve(runner, weights, settings)
            self._since = 0
            started = time.perf_counter()
            found = self.strategy.solve(runner, weights, settings)
            return _Solved(found, (time.perf_counter() - started) * 1e6)
