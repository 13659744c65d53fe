# SPDX-License-Identifier: Apache-2.0
"""When to run the solver again. It costs time that decoding does not get back, so: rarely.

A solve may use a share of the time since the last one, the larger the more there is to win.
Solves that leave the policy declining make the next one exponentially rarer.
"""

from __future__ import annotations

from collections.abc import Callable

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.types import Batch, Frontier, Mode

_GAIN_REALISM = 0.1
"""Share of the gap between the ceiling (every draft accepted) and today that a solve may win."""
_MIN_SHARE, _MAX_SHARE = 0.005, 0.02
"""Bounds of the share of serving time that solving may use, after the first solve."""
_MAX_DOUBLINGS = 6
_STILL_USED = 0.5
"""Plans that were worth finding are used beyond this share of the rounds until the next solve.
Sampled text is accepted less than greedy choices agree: some draft for a dozen rounds at first."""


class ResolveRule:
    """Keeps count of rounds and solves; answers whether another solve is due."""

    def __init__(self, config: KnapSpecConfig, costs: CostModel) -> None:
        self._config = config
        self._costs = costs
        self._rounds = 0
        self._elapsed_us = 0.0
        self._last_use = 0
        """Number of the last round that speculated."""
        self._solve_us: float | None = None
        self._fruitless = 0

    def note_round(self, speculates: bool, time_us: float) -> None:
        """One round was chosen; time_us: its predicted time."""
        self._rounds += 1
        self._elapsed_us += time_us
        if speculates:
            self._last_use = self._rounds

    def note_solve(self, time_us: float, found: bool = True) -> None:
        """A solve was paid for, whether or not it found anything."""
        if self._solve_us is not None:
            useful = found and 0 < self._last_use >= _STILL_USED * self._rounds
            self._fruitless = 0 if useful else min(self._fruitless + 1, _MAX_DOUBLINGS)
        self._solve_us = time_us
        self._rounds = 0
        self._elapsed_us = 0.0
        self._last_use = 0

    def reason(
        self,
        batch: Batch,
        frontier: Frontier | None,
        drift: float,
        speedup: float,
        ceiling: Callable[[], float],
    ) -> str | None:
        """Why to solve now: "first", "drift", "range" or "age"; None: do not.

        drift: observed minus estimated acceptance of the plan last chosen, which may be why none
        is now. speedup: of the current choice. ceiling: speedup if every draft of the
        cheapest plan were accepted; asked for last.
        """
        trigger = self._trigger(batch, frontier, drift)
        if trigger is None or self._items_us(batch) <= 0:  # curves with nothing to save on them
            return None
        highest = ceiling()
        if highest < self._config.min_speedup and not self._config.always_draft:
            return None
        return trigger if self._repays(speedup, highest) else None

    def _trigger(self, batch: Batch, frontier: Frontier | None, drift: float) -> str | None:
        if frontier is None:
            return "first"
        if abs(drift) > self._config.resolve_drift:
            return "drift"
        if self._rounds >= self._config.resolve_rounds * 2**self._fruitless:
            return "age"
        if self._cost_ratio(batch, frontier) > self._config.resolve_cost_ratio:
            return "range"
        return None

    def _repays(self, speedup: float, ceiling: float) -> bool:
        if self._solve_us is None:
            return True
        share = min(max(_GAIN_REALISM * (ceiling - speedup), _MIN_SHARE), _MAX_SHARE)
        return self._elapsed_us * share / 2**self._fruitless >= self._solve_us

    def _items_us(self, batch: Batch) -> float:
        attention_us = self._costs.item_us("attention", Mode.FULL, batch)
        return attention_us + self._costs.item_us("mlp", Mode.FULL, batch)

    def _cost_ratio(self, batch: Batch, frontier: Frontier) -> float:
        """How far attention's price relative to the MLP's has moved since the solve, >= 1."""
        solved = Batch(frontier.rows, frontier.context_tokens)
        now, then = self._relative_price(batch), self._relative_price(solved)
        if now <= 0 or then <= 0:
            return 1.0
        return max(now / then, then / now)

    def _relative_price(self, batch: Batch) -> float:
        mlp_us = self._costs.item_us("mlp", Mode.FULL, batch)
        return self._costs.item_us("attention", Mode.FULL, batch) / mlp_us if mlp_us > 0 else 0.0
