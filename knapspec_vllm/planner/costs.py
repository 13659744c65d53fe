# SPDX-License-Identifier: Apache-2.0
"""Cost model: what a verify step and a draft forward of a plan cost for a batch.

All times are microseconds. Verify steps are priced as measured, one curve per number of tokens a
row carries. One token per row is a curve of its own: many attention backends leave their decode
path at two, so nothing is ever interpolated between the two. A draft forward is the sum of a fixed
part (embedding, final norm, head, sampling, Python) and of its items; the items are told apart by
measuring uniform drafts (everything, no attention, no MLP, nothing, all attention windowed).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from knapspec_vllm.planner.curves import Curve, median
from knapspec_vllm.planner.fitting import DraftPoints, Points, fit_drafts, fit_step
from knapspec_vllm.planner.types import Batch, ItemKind, Mode, Plan

SCHEMA = 1
DRAFT_KINDS = ("draft_full", "draft_window", "draft_no_attention", "draft_no_mlp", "draft_empty")


@dataclass(frozen=True)
class CostSample:
    """One measurement: the time of a step or of a whole draft forward."""

    kind: str
    """"step" (target step) or one of DRAFT_KINDS (draft forward of a uniform plan)."""
    rows: int
    tokens_per_row: int
    """Tokens each row feeds: 1 + drafted tokens for a step, 1 for a draft."""
    context_tokens: int
    """Sum of context lengths over the rows."""
    time_us: float

    def __post_init__(self) -> None:
        if self.kind != "step" and self.kind not in DRAFT_KINDS:
            raise ValueError(f"unknown kind of cost sample: {self.kind!r}")
        if self.rows < 1 or self.tokens_per_row < 1 or self.context_tokens < 0:
            raise ValueError(f"impossible batch in cost sample: {self}")
        if not (math.isfinite(self.time_us) and self.time_us > 0):
            raise ValueError(f"a measured time must be positive, got {self.time_us}")


def times_by_shape(
    samples: Iterable[CostSample],
) -> dict[tuple[str, int, int, int], list[float]]:
    """(kind, rows, tokens per row, context tokens) -> microseconds of its repetitions."""
    times: dict[tuple[str, int, int, int], list[float]] = defaultdict(list)
    for sample in samples:
        shape = (sample.kind, sample.rows, sample.tokens_per_row, sample.context_tokens)
        times[shape].append(sample.time_us)
    return times


@dataclass(frozen=True)
class DraftPrices:
    """Parts of a draft forward for one batch, microseconds; items per layer."""

    num_layers: int
    fixed_us: float
    attention_us: float
    window_us: float
    mlp_us: float

    @property
    def target_items_us(self) -> float:
        """All items in full."""
        return self.num_layers * (self.attention_us + self.mlp_us)

    def items_us(self, plan: Plan) -> float:
        """The plan's items, without the fixed part."""
        if plan.num_layers != self.num_layers:
            raise ValueError(f"plan has {plan.num_layers} layers, costs {self.num_layers}")
        return (
            plan.count("attention", Mode.FULL) * self.attention_us
            + plan.count("attention", Mode.WINDOW) * self.window_us
            + plan.count("mlp", Mode.FULL) * self.mlp_us
        )

    def draft_us(self, plan: Plan) -> float:
        """One draft forward of the plan."""
        return self.fixed_us + self.items_us(plan)


@dataclass(frozen=True)
class CostModel:
    """Fitted curves. Build with fit(); keep with to_json()."""

    num_layers: int
    window_tokens: int
    """Tokens of a row that a WINDOW attention reads (sink + window)."""
    steps: tuple[tuple[int, Curve], ...]
    """(tokens per row, curve of the whole target step), ascending, starting at 1."""
    fixed: Curve
    attention: Curve
    attention_window: Curve
    """Its context argument is what the windows read: min(context, rows * window_tokens)."""
    mlp: Curve

    def __post_init__(self) -> None:
        grid = [tokens for tokens, _ in self.steps]
        if len(grid) < 2 or grid[0] != 1 or grid != sorted(set(grid)):
            raise ValueError(
                "step samples are needed for tokens_per_row 1 and at least one larger value, "
                f"got {grid}"
            )
        if self.num_layers < 1 or self.window_tokens < 1:
            raise ValueError("num_layers and window_tokens must be positive")

    @classmethod
    def fit(
        cls, samples: Iterable[CostSample], num_layers: int, window_tokens_total: int
    ) -> CostModel:
        """Fits the curves. window_tokens_total: sink + window tokens that one row reads.

        Needs steps at 1 and at least one larger number of tokens per row, and draft_full plus at
        least two of draft_no_attention, draft_no_mlp and draft_empty. Repeated measurements of a
        cell count once, by their median. Raises ValueError when something is missing.
        """
        steps: dict[int, Points] = defaultdict(lambda: defaultdict(list))
        drafts: DraftPoints = defaultdict(list)
        for (kind, rows, tokens, context), times in sorted(times_by_shape(samples).items()):
            if kind == "step":
                steps[tokens][rows].append((context, median(times)))
            else:
                drafts[rows].append((kind, context, median(times)))
        fixed, attention, window, mlp = fit_drafts(drafts, num_layers, window_tokens_total)
        return cls(
            num_layers=num_layers,
            window_tokens=window_tokens_total,
            steps=tuple((tokens, fit_step(steps[tokens])) for tokens in sorted(steps)),
            fixed=fixed,
            attention=attention,
            attention_window=window,
            mlp=mlp,
        )

    def step_us(self, batch: Batch, tokens_per_row: float) -> float:
        """Target step in which rows feed tokens_per_row tokens each; non-decreasing in them.

        In the mean, where rows differ: what a step does to a token is the same for whose it is.
        """
        if tokens_per_row < 1:
            raise ValueError(f"tokens_per_row must be at least 1, got {tokens_per_row}")
        before_us = self.steps[0][1].at(batch.rows, batch.context_tokens)
        if tokens_per_row == 1:
            return before_us
        before = 1
        slope_us = 0.0
        for tokens, curve in self.steps[1:]:
            here_us = max(before_us, curve.at(batch.rows, batch.context_tokens))
            slope_us = (here_us - before_us) / (tokens - before)
            if tokens_per_row <= tokens:
                if before == 1:  # never between 1 and the next curve: take the dearer one
                    return here_us
                return here_us - slope_us * (tokens - tokens_per_row)
            before, before_us = tokens, here_us
        return before_us + slope_us * (tokens_per_row - before)

    def item_us(self, kind: ItemKind, mode: Mode, batch: Batch) -> float:
        """One item in a mode; 0.0 for SKIP."""
        if mode is Mode.SKIP:
            return 0.0
        if kind == "mlp":
            if mode is Mode.WINDOW:
                raise ValueError("an MLP has no mode WINDOW")
            return self.mlp.at(batch.rows, 0)
        # A window that covers the whole context is FULL; measuring noise must not tell them apart,
        # or the solver spends its branches on WINDOW where it saves nothing.
        windowed = batch.rows * self.window_tokens
        if mode is Mode.WINDOW and windowed < batch.context_tokens:
            return self.attention_window.at(batch.rows, windowed)
        return self.attention.at(batch.rows, batch.context_tokens)

    def fixed_us(self, batch: Batch) -> float:
        """What every draft forward pays: embedding, final norm, head, sampling, Python."""
        return self.fixed.at(batch.rows, 0)

    def draft_us(self, plan: Plan, batch: Batch) -> float:
        """One draft forward of a plan: one token in every row."""
        return self.prices(batch).draft_us(plan)

    def prices(self, batch: Batch) -> DraftPrices:
        """Everything a draft forward of this batch is made of; prices many plans quickly."""
        return DraftPrices(
            num_layers=self.num_layers,
            fixed_us=self.fixed_us(batch),
            attention_us=self.item_us("attention", Mode.FULL, batch),
            window_us=self.item_us("attention", Mode.WINDOW, batch),
            mlp_us=self.item_us("mlp", Mode.FULL, batch),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "schema": SCHEMA,
            "num_layers": self.num_layers,
            "window_tokens": self.window_tokens,
            "steps": [[tokens, asdict(curve)] for tokens, curve in self.steps],
            **{name: asdict(getattr(self, name)) for name in _CURVES},
        }

    @classmethod
    def from_json(cls, obj: Any) -> CostModel:
        """Inverse of to_json. Raises ValueError on anything to_json would not have written."""
        try:
            if obj["schema"] != SCHEMA:
                raise ValueError(f"schema {obj['schema']!r}, this version reads {SCHEMA}")
            return cls(
                num_layers=int(obj["num_layers"]),
                window_tokens=int(obj["window_tokens"]),
                steps=tuple((int(tokens), _curve(entry)) for tokens, entry in obj["steps"]),
                **{name: _curve(obj[name]) for name in _CURVES},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a stored cost model: {error}") from error


_CURVES = ("fixed", "attention", "attention_window", "mlp")


def _curve(obj: Mapping[str, Any]) -> Curve:
    return Curve(
        rows=tuple(int(value) for value in obj["rows"]),
        base_us=tuple(float(value) for value in obj["base_us"]),
        per_row_token_us=tuple(float(value) for value in obj["per_row_token_us"]),
    )
