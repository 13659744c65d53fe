# SPDX-License-Identifier: Apache-2.0
"""Decides what a round drafts; `solving` finds the plans to choose from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.draft.agreement import Agreement
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.observed import MeasuredRound, Verified
from knapspec_vllm.draft.references import References, Wanted
from knapspec_vllm.draft.solving import Solving
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.metrics.stats import Stats, StepCounts
from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.policy import Policy, alike
from knapspec_vllm.planner.types import Batch, Choice, Frontier, Plan

logger = logging.getLogger("vllm.knapspec")

_LOOK_EVERY = 8
"""Rounds for which a decision to decline holds while the batch stays of a kind. Deciding takes 0.1
to 0.2 ms, 1% of a small model's step, and what is decided on changes over dozens of rounds."""


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
        self._agreement = agreement
        self._stats = stats
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
        #: Tokens a row, in the mean, of the last batch that drafted.
        self.drafting_context = 0.0
        self._logged = False
        self.solving = Solving(config, engine, geometry, agreement, stats, on_frontier)
        self._declined_kind: tuple[int, int, int] | None = None
        self._repeats = 0
        self._never_drafts = False
        """By its settings, whatever the batch."""
        self._rows: tuple[str, ...] = ()

    @property
    def wanted(self) -> Wanted:
        """What plans are judged on."""
        engine = self._engine
        return Wanted.of(
            self._config, self.solving.reference_tokens, engine.device.type, engine.max_model_len
        )

    @property
    def solving_under_way(self) -> bool:
        """Whether the device may be busy with a solve."""
        return self.solving.under_way

    def choose(
        self,
        batch: Batch,
        max_draft_length: int,
        references: Callable[[], References | None],
        opted_out: bool = False,
    ) -> Choice:
        """What this round drafts; solves first when the policy asks. All TP ranks call it.

        opted_out: nobody in the batch wants drafts.
        """
        if max_draft_length <= 0:  # rows about to end: says nothing of the plan, so keep it
            code = "opted out" if opted_out else "no room"
            self._declined_kind = None
            self._stats.add_choice(batch.rows, False, code)
            return Choice(None, 0, 1.0, "no room for a draft in this batch", code)
        choice = self._without_policy(max_draft_length)
        self._never_drafts = choice is not None and choice.plan is None
        if choice is not None:
            self._declined_kind = None
        else:
            assert self.policy is not None
            self.solving.collect(self.policy)
            choice = self._still_declined(batch, max_draft_length)
        if choice is None:
            assert self.policy is not None
            if self._forced is None and self._config.resolve:
                self.solving.start(self.policy, batch, references)
                self.solving.collect(self.policy)  # a CPU has it at once
            choice = self._agreement.share(
                self.policy.choose(batch, max_draft_length) if self._agreement.leads else None,
                self._seen(batch, max_draft_length),
            )
            assert choice is not None
            declined = choice.code == "no gain"
            self._declined_kind = _kind(batch, max_draft_length) if declined else None
            self._repeats = 0
        self._note(choice, batch)
        return choice

    def rests(self, req_ids: Sequence[str], steady: bool) -> bool:
        """Whether a round of these rows declines unseen: while the decision to decline them holds.
        Every rank comes to the same. steady: all rows have got a token, and the round before this
        one is being measured.

        Looking costs 0.2 ms of a round, 0.7% of a small model's, and tells nothing new for a while.
        """
        rows, self._rows = self._rows, tuple(req_ids)
        if not (steady and rows == self._rows):
            return False
        if not self._never_drafts:
            holds = self._declined_kind is not None and 0 < self._repeats < _LOOK_EVERY
            if not holds or self.solving.requested:
                return False
            self._repeat()
        self._stats.add_choice(len(rows), False, self.last_choice.code)
        return True

    def look_again(self) -> None:
        """The next round is decided anew, though its batch may be of a kind that is declined."""
        self._declined_kind = None

    def force(self, plan: Plan, draft_length: int) -> None:
        """Draft `draft_length` tokens with `plan` in every round from now on."""
        self._forced, self._forced_length = plan, draft_length
        self._never_drafts = False

    def request_solve(self) -> None:
        """Solve in the next round whatever the policy thinks; call it on every rank."""
        self.solving.requested = True

    def feedback(self, plan: Plan, verified: Sequence[Verified], context: float) -> None:
        """A round's drafts have been verified. context: of the batch that drafted them, tokens a
        row in the mean."""
        for row in verified:
            self._stats.add_verified(row.accepted, row.drafted, row.context)
        # Asked for by batch, not by row: rows of 300 and 20,000 tokens would teach lengths that no
        # batch of both has.
        telling = [(row.accepted, row.drafted) for row in verified if row.telling]
        self.acceptance.observe(plan, telling, context)

    def observe_drafts(self, batch: Batch, plan: Plan, draft_length: int, time_us: float) -> None:
        """What the drafting of a usual round took."""
        if self.policy is not None:
            self.policy.observe_draft(batch, plan, draft_length, time_us)

    def observe_round(self, measured: MeasuredRound) -> None:
        """What a round took, and what it was predicted to take."""
        batch, choice = measured.batch, measured.choice
        solve_us = measured.solve_us
        self._stats.add_round(measured.step_us, measured.own_us, measured.draft_us, solve_us)
        if self.policy is None or not measured.usual:
            return
        self.policy.observe_step(batch, measured.fed, measured.step_us)
        plain_us = round_us = measured.draft_us + measured.step_us  # of a round that declined
        if choice.plan is not None:
            plain_us = measured.gained * self.policy.plain_us(batch)
        self._stats.add_prediction(choice.predicted_speedup, choice.round_us, plain_us, round_us)

    def count(self, counts: StepCounts) -> None:
        """What the scheduler of another process has counted."""
        self._stats.add_counts(counts)

    def _seen(self, batch: Batch, max_draft_length: int) -> tuple[int | str, ...] | None:
        """What every rank should have in common when it asks rank 0 what to do."""
        if self._agreement.alone:
            return None
        plan = self.last_choice.plan
        drafted = "" if plan is None else plan.key
        return (self._stats.rounds, batch.rows, batch.context_tokens, max_draft_length, drafted)

    def _still_declined(self, batch: Batch, max_draft_length: int) -> Choice | None:
        """The last decision, for some rounds, if it was to decline the same kind of batch.

        Every rank comes to the same, from what all of them know.
        """
        kind = _kind(batch, max_draft_length)
        if kind != self._declined_kind or self._repeats >= _LOOK_EVERY or self.solving.requested:
            return None
        self._repeat()
        return self.last_choice

    def _repeat(self) -> None:
        """The last decision stands for one more round."""
        assert self.policy is not None
        self._repeats += 1
        self.policy.count(self.last_choice)

    def _without_policy(self, max_draft_length: int) -> Choice | None:
        """What settings alone decide; None: the policy has to."""
        if self._forced_length == 0:
            return Choice(None, 0, 1.0, "draft_length is set to 0", "set to zero")
        if self._forced is not None and self._forced_length is not None:
            length = min(self._forced_length, max_draft_length)
            return Choice(self._forced, length, math.nan, "forced by settings")
        if self.policy is None:
            reason = "no cost curves (calibration is off and none are stored)"
            return Choice(None, 0, 1.0, reason, "no costs")
        return None

    def _note(self, choice: Choice, batch: Batch) -> None:
        """Count the choice, and log it when the plan changes or drafting stops or starts."""
        self._stats.add_choice(batch.rows, choice.draft_length > 0, choice.code)
        if choice.plan is not None:
            self.drafting_context = batch.context_per_row
        if choice.code in ("measuring", "probing"):  # for one round: not what was decided
            return
        changed = choice.plan != self.last_choice.plan
        if changed:
            began = "start" if self.last_choice.plan is None else "plan"
            self._stats.plan_changes["stop" if choice.plan is None else began] += 1
        if changed or not self._logged:
            self._log(choice, f"batch {batch.rows}, context {batch.context_per_row:.0f}")
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


def _kind(batch: Batch, max_draft_length: int) -> tuple[int, int, int]:
    """Batches for which a decision to decline holds; rows about to end do not shorten it."""
    rows, bucket, _ = alike(batch)
    return rows, bucket, max_draft_length
