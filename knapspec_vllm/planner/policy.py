# SPDX-License-Identifier: Apache-2.0
"""Policy: every round, which plan of the frontier drafts how many tokens, if any.

Evaluates the speedup of every plan for every draft length for the current batch. Speculation
starts above `min_speedup`, and only if it would not lose at the lower end of what acceptance may
be; it stops half-way between that and 1. The current plan and draft length stay unless another is
better by `hysteresis`. What plain decoding takes is measured too. Pure Python.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.corrections import Corrections
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.plain_rounds import PlainRounds
from knapspec_vllm.planner.probes import Probes
from knapspec_vllm.planner.resolve import ResolveRule
from knapspec_vllm.planner.speedups import Rates, SpeedupTable
from knapspec_vllm.planner.types import Batch, Choice, Frontier, Plan, PlanEstimate

_CONTEXT_BUCKET = math.log(1.06)
"""Batches whose context lies within 6% share an evaluation."""
_CACHE_ENTRIES = 256
_LEAST_FED = 1.5
"""Tokens a row: a step of fewer, and more than 1, shows neither what one token takes nor two."""


class Policy:
    """Chooses per round; learns from rounds; says when to solve again."""

    def __init__(
        self,
        config: KnapSpecConfig,
        costs: CostModel,
        acceptance: AcceptanceModel,
        num_speculative_tokens: int,
        num_layers: int,
    ) -> None:
        """Raises ValueError when forced settings do not fit the model or the maximum."""
        if costs.num_layers != num_layers:
            raise ValueError(f"cost model is for {costs.num_layers} layers, model has {num_layers}")
        if config.draft_length is not None and config.draft_length > num_speculative_tokens:
            raise ValueError(
                f"draft_length={config.draft_length} needs num_speculative_tokens >= "
                f"{config.draft_length}, it is {num_speculative_tokens}"
            )
        self._config = config
        self._costs = costs
        self._acceptance = acceptance
        self._max_draft_length = num_speculative_tokens
        self._corrections = Corrections(enabled=config.round_overhead_us is None)
        self._resolve = ResolveRule(config, costs)
        self._frontier: Frontier | None = None
        self._tables: dict[tuple[int, int, tuple[float, ...], int], SpeedupTable] = {}
        self._ceilings: dict[tuple[int, int, tuple[float, ...]], float] = {}
        self._version = (-1, -1)
        """Of acceptance and corrections, when the caches were filled."""
        self._current: tuple[Plan, int] | None = None
        self._speculating = False
        self._last = Choice(None, 0, 1.0, "no round yet", "no plan")
        self._drafted: tuple[Plan, float] | None = None
        """The plan last chosen, for rows of so many tokens: its drift may be why none is now."""
        self._declined_rounds = 0
        self._plain = PlainRounds(self._corrections)
        self._probes = Probes(config.min_speedup)
        #: Settings that say what to draft are obeyed in every round.
        self._may_measure = not config.always_draft and config.draft_length is None
        self._forced = config.plan != "auto"
        if self._forced:
            plan = Plan.parse(config.plan, num_layers)
            estimate = PlanEstimate(plan, cosine=1.0, hits=0, trials=0)
            self._install(Frontier((estimate,), context_tokens=0, rows=1, source="forced"))

    @property
    def costs(self) -> CostModel:
        return self._costs

    @property
    def frontier(self) -> Frontier | None:
        return self._frontier

    def set_frontier(self, frontier: Frontier) -> None:
        """Replaces the plans to choose from. A forced plan stays. Raises ValueError on a misfit."""
        if any(e.plan.num_layers != self._costs.num_layers for e in frontier.estimates):
            raise ValueError(f"frontier is not for {self._costs.num_layers} layers")
        if not self._forced:
            self._install(frontier)
            self._probes.look_anew()

    def choose(self, batch: Batch, max_draft_length: int) -> Choice:
        """What to do now; max_draft_length: what the batch has room for."""
        choice = self._decide(batch, max_draft_length)
        if choice.plan is not None:
            self._drafted = choice.plan, batch.context_per_row
        self.count(choice)
        measures = self._speculating and self._may_measure
        if measures and self._plain.due(batch, choice.predicted_speedup):
            return self._decline(batch, "measuring", "a round to measure plain decoding")
        if choice.code == "no gain" and self._probes.may_be_due(batch):
            table = self._table(batch, self._lengths(max_draft_length))
            plans = [estimate.plan for estimate in self._frontier.estimates]  # type: ignore[union-attr]
            pace = self._corrections.pace(batch)
            return self._probes.choose(batch, table, plans, self._acceptance, pace) or choice
        return choice

    def count(self, choice: Choice) -> None:
        """A round goes by this choice; `choose` counts its own."""
        self._speculating = choice.plan is not None
        self._current = None if choice.plan is None else (choice.plan, choice.draft_length)
        self._last = choice
        self._corrections.note_round()
        self._resolve.note_round(self._speculating, choice.round_us)
        self._probes.note_round(declined=not self._speculating)
        self._declined_rounds = 0 if self._speculating else self._declined_rounds + 1
        if self._declined_rounds >= self._config.resolve_rounds:
            self._declined_rounds = 0  # nothing is learned while declining, and traffic changes
            self._acceptance.forget()
            self._corrections.forget()
            self._probes.look_anew()

    def explain(self, batch: Batch) -> list[tuple[Plan, int, float, float]]:
        """(plan, its draft length, alpha, predicted speedup), best first."""
        lengths = self._lengths(self._max_draft_length)
        if self._frontier is None or not self._frontier.estimates or not lengths:
            return []
        table = self._table(batch, lengths)
        found, estimates = [], self._frontier.estimates
        for estimate, alpha, row in zip(estimates, table.alphas, table.speedups, strict=True):
            column = max(range(len(row)), key=row.__getitem__)
            found.append((estimate.plan, table.rates.lengths[column], alpha, row[column]))
        return sorted(found, key=lambda entry: -entry[3])

    def observe_step(self, batch: Batch, tokens_per_row: float, time_us: float) -> None:
        """Learns what a round without its drafting took; above 1 token a row it verified."""
        if 1.0 < tokens_per_row < _LEAST_FED:
            return
        predicted_us = self._costs.step_us(batch, tokens_per_row)
        part: Literal["plain", "verify"] = "verify" if tokens_per_row > 1 else "plain"
        self._corrections.observe(part, batch, predicted_us, time_us)

    def observe_draft(self, batch: Batch, plan: Plan, forwards: int, time_us: float) -> None:
        """Learns what the drafting of a round took."""
        price_us = self._costs.draft_us(plan, batch)
        self._corrections.observe("draft", batch, forwards * price_us, time_us)

    def plain_us(self, batch: Batch) -> float:
        """A plain decode step as rounds have shown it to be, microseconds."""
        return self._corrections.factor("plain", batch) * self._costs.step_us(batch, 1)

    def resolve_reason(self, batch: Batch, reference_ready: bool) -> str | None:
        """Why to solve now: "first", "drift", "range" or "age"; None: do not. reference_ready:
        enough committed tokens are at hand to judge plans on."""
        if not reference_ready or self._forced or not self._config.resolve:
            return None
        lengths = self._lengths(self._max_draft_length)
        if not lengths:
            return None
        drift = 0.0 if self._drafted is None else self._acceptance.drift(*self._drafted)
        return self._resolve.reason(
            batch, self._frontier, drift, self._last.predicted_speedup,
            lambda: self._ceiling(batch, lengths),
        )  # fmt: skip

    def note_solve(self, time_us: float, found: bool = True) -> None:
        """A solve was paid for; call it whether or not a frontier came of it."""
        self._resolve.note_solve(time_us, found)

    def _install(self, frontier: Frontier) -> None:
        self._acceptance.retain({estimate.plan for estimate in frontier.estimates})
        self._acceptance.priors(frontier.estimates)
        self._frontier = frontier
        self._tables.clear()

    def _lengths(self, max_draft_length: int) -> tuple[int, ...]:
        longest = min(max_draft_length, self._max_draft_length)
        if self._config.draft_length is not None:
            forced = min(self._config.draft_length, longest)
            return (forced,) if forced > 0 else ()
        return tuple(range(1, longest + 1))

    def _decide(self, batch: Batch, max_draft_length: int) -> Choice:
        lengths = self._lengths(max_draft_length)
        if self._config.draft_length == 0:
            return self._decline(batch, "set to zero", "draft_length is set to 0")
        if not lengths:
            return self._decline(batch, "no room", "no room for a draft in this batch")
        if self._frontier is None:
            return self._decline(batch, "no plan", "no plan yet: the solver has not run")
        if not self._frontier.estimates:
            return self._decline(batch, "no plan", "the solver found no plan")
        table = self._table(batch, lengths)
        index, column = self._with_hysteresis(table)
        speedup = table.speedups[index][column]
        length = table.rates.lengths[column]
        facts = f"acceptance {table.alphas[index]:.2f} at {table.saved[index]:.0%} saved"
        if reason := self._decline_reason(batch, table, index, column):
            return self._decline(batch, "no gain", f"{reason}: {facts}")
        round_us = length * table.draft_us[index] + table.rates.verify_us[column]
        return Choice(
            self._frontier.estimates[index].plan,
            length,
            speedup,
            f"predicted speedup {speedup:.2f}: {facts}",
            round_us=self._corrections.pace(batch) * round_us,
        )

    def _decline(self, batch: Batch, code: str, reason: str) -> Choice:
        return Choice(None, 0, 1.0, reason, code, self.plain_us(batch))

    def _with_hysteresis(self, table: SpeedupTable) -> tuple[int, int]:
        assert self._frontier is not None
        best = table.speedups[table.best[0]][table.best[1]]
        if self._current is None or self._current[1] not in table.rates.lengths:
            return table.best
        plan, length = self._current
        column = table.rates.lengths.index(length)
        for index, estimate in enumerate(self._frontier.estimates):
            if estimate.plan == plan:
                kept = table.speedups[index][column] * (1.0 + self._config.hysteresis)
                return table.best if best > kept else (index, column)
        return table.best

    def _decline_reason(
        self, batch: Batch, table: SpeedupTable, index: int, column: int
    ) -> str | None:
        if self._config.always_draft or self._config.draft_length is not None:
            return None
        speedup = table.speedups[index][column]
        margin = self._config.min_speedup - 1.0
        needed = 1.0 + (0.5 * margin if self._speculating else margin)
        if speedup < needed:
            return f"predicted speedup {speedup:.2f} < {needed:.2f}"
        if not self._speculating:
            assert self._frontier is not None
            plan = self._frontier.estimates[index].plan
            doubted = self._acceptance.lower(plan, batch.context_per_row)
            cautious = table.rates.row(doubted, table.draft_us[index])[column]
            if cautious < 1.0:
                return f"predicted speedup {speedup:.2f} may be {cautious:.2f}"
        return None

    def _table(self, batch: Batch, lengths: tuple[int, ...]) -> SpeedupTable:
        self._renew_caches()
        key = (*alike(batch), lengths[-1])
        if (table := self._tables.get(key)) is None:
            assert self._frontier is not None
            plans = [estimate.plan for estimate in self._frontier.estimates]
            alphas = [self._acceptance.alpha(plan, batch.context_per_row) for plan in plans]
            table = SpeedupTable.of(self._rates(batch, lengths), plans, alphas)
            self._tables[key] = table
        return table

    def _renew_caches(self) -> None:
        version = (self._acceptance.version, self._corrections.version)
        if version != self._version or len(self._tables) + len(self._ceilings) >= _CACHE_ENTRIES:
            self._tables.clear()
            self._ceilings.clear()
            self._version = version

    def _ceiling(self, batch: Batch, lengths: tuple[int, ...]) -> float:
        """Speedup if the cheapest plan the settings allow had every draft accepted."""
        self._renew_caches()
        key = alike(batch)
        if key not in self._ceilings:
            self._ceilings[key] = self._new_ceiling(batch, lengths)
        return self._ceilings[key]

    def _new_ceiling(self, batch: Batch, lengths: tuple[int, ...]) -> float:
        config, prices = self._config, self._costs.prices(batch)
        layers = prices.num_layers
        kept = min(config.keep_first_layers + config.keep_last_layers, layers)
        items_us = max(1.0 - config.max_saving, kept / layers) * prices.target_items_us
        rates = replace(self._rates(batch, lengths), kept=1.0)
        return max(rates.row(1.0, rates.draft_us(items_us)))

    def _rates(self, batch: Batch, lengths: tuple[int, ...]) -> Rates:
        return Rates.of(
            self._costs, batch, lengths,
            paper=self._config.objective == "paper",
            plain=self._corrections.relative("plain", batch),
            verify=self._corrections.relative("verify", batch),
            draft=self._corrections.relative("draft", batch),
            round_us=self._config.round_overhead_us or 0.0,
            kept=self._acceptance.kept(batch.context_per_row),
        )  # fmt: skip


def alike(batch: Batch) -> tuple[int, int, tuple[float, ...]]:
    """Batches for which this is equal are decided alike. In large ones some row is always about to
    end, so shares of rows count in tenths."""
    bucket = int(math.log1p(batch.context_tokens) / _CONTEXT_BUCKET)
    return batch.rows, bucket, tuple(round(share, 1) for share in batch.room)
