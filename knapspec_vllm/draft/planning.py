# SPDX-License-Identifier: Apache-2.0
"""Decides what a round drafts, and when to solve for new plans."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.draft.agreement import Agreement
from knapspec_vllm.draft.branches import VllmBranches
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.references import References
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner import baselines
from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.policy import Policy, alike
from knapspec_vllm.planner.solver import ItemWeights, PendingSolve, SolverSettings, start_solve
from knapspec_vllm.planner.types import Batch, Choice, Frontier, Mode, Plan, PlanEstimate

logger = logging.getLogger("vllm.knapspec")

_LOOK_EVERY = 8
"""Rounds for which a decision to decline holds while the batch stays of a kind. Deciding takes 0.1
to 0.2 ms, 1% of a small model's step, and what is decided on changes over dozens of rounds."""


@dataclass(frozen=True)
class _Solved:
    """What a strategy found; it has waited for the device itself."""

    estimates: tuple[PlanEstimate, ...]
    time_us: float

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


class Planning:
    """Policy, acceptance and solver of one engine, agreed on by its tensor-parallel ranks.

    Without cost curves (`calibration: off` and none stored) only forced settings draft.
    """

    def __init__(
        self,
        config: KnapSpecConfig,
        engine: Engine,
        geometry: WindowGeometry,
        agreement: Agreement,
        stats: Stats,
        num_speculative_tokens: int,
        costs: CostModel | None,
        frontier: Frontier | None,
        on_frontier: Callable[[Frontier], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._geometry = geometry
        self._agreement = agreement
        self._stats = stats
        self._on_frontier = on_frontier
        self._forced = (
            None if config.plan == "auto" else Plan.parse(config.plan, engine.view.num_layers)
        )
        self._forced_length = config.draft_length
        self.acceptance = AcceptanceModel(config.prior_weight, config.feedback_half_life)
        self.policy: Policy | None = None
        if costs is not None:
            self.policy = Policy(
                config, costs, self.acceptance, num_speculative_tokens, engine.view.num_layers
            )
            if frontier is not None:
                self.policy.set_frontier(frontier)
        #: What the last round did, and the last round that drafted.
        self.last_choice = Choice(None, 0, 1.0, "no round yet")
        self.last_drafting_choice = self.last_choice
        self._logged = False
        self._strategy = None if config.strategy == "knapspec" else baselines.make(config.strategy)
        self._since_solve: int | None = None
        """Rounds since a strategy's last solve."""
        self._solve_requested = False
        self._pending: _Pending | None = None
        self._declined_kind: tuple[int, int, float, int] | None = None
        self._repeats = 0

    @property
    def reference_tokens(self) -> int:
        """How many committed tokens, over all rows, plans are judged on."""
        if self._strategy is not None:
            return self._strategy.reference_tokens
        return self._config.reference_tokens * self._config.reference_rows

    def choose(
        self,
        batch: Batch,
        max_draft_length: int,
        references: Callable[[], References | None],
    ) -> Choice:
        """What this round drafts; solves first when the policy asks. All TP ranks call it."""
        if max_draft_length <= 0:  # rows about to end: says nothing of the plan, so keep it
            code = "no room" if batch.share > 0 else "opted out"
            self._stats.add_choice(batch.rows, False, code)
            return Choice(None, 0, 1.0, "no room for a draft in this batch", code)
        choice = self._without_costs(max_draft_length)
        if choice is None:
            assert self.policy is not None
            self._collect_solve()
            choice = self._still_declined(batch, max_draft_length)
        if choice is None:
            assert self.policy is not None
            self._maybe_solve(batch, references)
            self._collect_solve()  # a CPU has it at once
            choice = self._agreement.share(
                self.policy.choose(batch, max_draft_length) if self._agreement.leads else None
            )
            assert choice is not None
            declined = choice.code == "no gain"
            self._declined_kind = (*alike(batch), max_draft_length) if declined else None
            self._repeats = 0
        self._note(choice, batch)
        return choice

    def force(self, plan: Plan, draft_length: int) -> None:
        """Draft `draft_length` tokens with `plan` in every round from now on."""
        self._forced, self._forced_length = plan, draft_length

    def request_solve(self) -> None:
        """Solve in the next round whatever the policy thinks; call it on every rank."""
        self._solve_requested = True

    def feedback(
        self, plan: Plan, accepted: int, drafted: int, context: int, says_something: bool = True
    ) -> None:
        """`accepted` of `drafted` (scheduled) tokens of one row were kept by verification.

        context: the row's length in tokens. says_something: of the plan.
        """
        self._stats.add_verified(accepted, drafted, context)
        if says_something:
            self.acceptance.observe(plan, accepted, drafted)

    def _still_declined(self, batch: Batch, max_draft_length: int) -> Choice | None:
        """The last decision, for some rounds, if it was to decline the same kind of batch.

        Every rank comes to the same, from what all of them know.
        """
        assert self.policy is not None
        kind = (*alike(batch), max_draft_length)
        if kind != self._declined_kind or self._repeats >= _LOOK_EVERY or self._solve_requested:
            return None
        self._repeats += 1
        self.policy.count(self.last_choice)
        return self.last_choice

    def _without_costs(self, max_draft_length: int) -> Choice | None:
        if self._forced is not None and self._forced_length is not None:
            length = min(self._forced_length, max_draft_length)
            if length == 0:
                return Choice(None, 0, 1.0, "draft_length is set to 0", "set to zero")
            return Choice(self._forced, length, math.nan, "forced by settings")
        if self.policy is None:
            reason = "no cost curves (calibration is off and none are stored)"
            return Choice(None, 0, 1.0, reason, "no costs")
        return None

    def _maybe_solve(self, batch: Batch, references: Callable[[], References | None]) -> None:
        assert self.policy is not None
        if self._forced is not None or not self._config.resolve or self._pending is not None:
            return
        reason = "requested" if self._solve_requested else None
        if reason is None and self._agreement.leads:
            reason = self._resolve_reason(batch)
        reason = self._agreement.share(reason)
        if reason is None:
            return
        found = references()  # same on every rank: derived from the scheduler's output only
        if found is not None:
            self._solve_requested = False
            self._start_solve(batch, found, reason)

    def _resolve_reason(self, batch: Batch) -> str | None:
        assert self.policy is not None
        if self._strategy is None:
            return self.policy.resolve_reason(batch, True)
        if self._since_solve is None:
            return "first"
        self._since_solve += 1
        every = self._strategy.resolve_every
        return "age" if every is not None and self._since_solve >= every else None

    def _start_solve(self, batch: Batch, references: References, reason: str) -> None:
        assert self.policy is not None
        costs, config = self.policy.costs, self._config
        weights = self._agreement.share(
            ItemWeights(
                attention_full_us=costs.item_us("attention", Mode.FULL, batch),
                attention_window_us=costs.item_us("attention", Mode.WINDOW, batch),
                mlp_us=costs.item_us("mlp", Mode.FULL, batch),
                fixed_us=costs.fixed_us(batch),
            )
        )
        settings = SolverSettings(
            bins=config.bins,
            live_branches=config.live_branches,
            max_saving=config.max_saving,
            prune_cosine=config.prune_cosine,
            keep_first_layers=config.keep_first_layers,
            keep_last_layers=config.keep_last_layers,
            windows=config.windows,
        )
        with torch.inference_mode():
            runner = VllmBranches(self._engine, self._geometry, references)
            pending: PendingSolve | _Solved
            if self._strategy is None:
                pending = start_solve(runner, weights, settings)
            else:
                self._since_solve = 0
                started = time.perf_counter()
                found = self._strategy.solve(runner, weights, settings)
                pending = _Solved(found, (time.perf_counter() - started) * 1e6)
        context = f"{reason}; batch {batch.rows}, context {batch.context_tokens}"
        self._pending = _Pending(
            pending, batch, f"{context}, {len(references.tokens)} reference tokens"
        )

    def _collect_solve(self) -> None:
        """Install the frontier of a solve that has come back from the device; never waits."""
        if self._pending is None:
            return
        solve, batch = self._pending.solve, self._pending.batch
        if not self._agreement.share(solve.ready() if self._agreement.leads else None):
            return
        estimates = self._agreement.share(solve.result() if self._agreement.leads else ())
        frontier = Frontier(estimates, batch.context_tokens, batch.rows, "solved")
        assert self.policy is not None
        self.policy.set_frontier(frontier)
        self.policy.note_solve(solve.time_us)
        self._stats.add_solve(solve.time_us)
        logger.info(
            "KnapSpec solved %d plans in %.0f ms (%s)",
            len(estimates), solve.time_us / 1e3, self._pending.described,
        )  # fmt: skip
        self._pending = None
        if self._agreement.leads:
            self._on_frontier(frontier)

    def _note(self, choice: Choice, batch: Batch) -> None:
        """Count the choice, and log it when the plan changes or drafting stops or starts."""
        self._stats.add_choice(batch.rows, choice.draft_length > 0, choice.code)
        if choice.code in ("measuring", "probing"):  # for one round: not what was decided
            return
        changed = choice.plan != self.last_choice.plan
        self._stats.plan_changes += changed
        if changed or not self._logged:
            self._log(choice, f"batch {batch.rows}, context {batch.context_tokens}")
        self.last_choice = choice
        if choice.plan is not None:
            self.last_drafting_choice = choice

    def _log(self, choice: Choice, where: str) -> None:
        self._logged = True
        if not self._agreement.leads:
            return
        if choice.plan is None:
            logger.info("KnapSpec declines: %s (%s)", choice.reason, where)
            return
        speedup = choice.predicted_speedup
        logger.info(
            "KnapSpec plan: %s, draft length %d, predicted speedup %s (%s): %s",
            choice.plan.describe(),
            choice.draft_length,
            "unknown" if math.isnan(speedup) else f"{speedup:.2f}x",
            where,
            choice.reason,
        )
