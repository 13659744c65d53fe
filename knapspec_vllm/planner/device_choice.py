# SPDX-License-Identifier: Apache-2.0
"""The decision of `policy.Policy` taken on the device, from context lengths that are already there.

The host never waits for the batch: it passes on what it learns (frontier, acceptance, corrections)
when that changes, and the choice stays on the device until someone reads it. The numbers are
float32 here and float64 in `Policy`, so choices may differ where two speedups are equal to 1e-6;
and a table is computed for the exact context, where `Policy` shares one among contexts within 6%.
Rows that have less room than others (`Batch.room`) are not known here.
Which rounds measure plain decoding instead of drafting is for the caller to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from knapspec_vllm import ops
from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.curves import Curve
from knapspec_vllm.planner.types import Frontier, Mode, Plan

_ENDLESS = float(1 << 30)
"""Rows, of a curve's last segment."""


class DeviceChooser:
    """Chooses per round like `Policy.choose`, without waiting for the device.

    Its inputs are buffers that later calls fill in place, so `choose` can be captured in a CUDA
    graph; set_frontier makes new ones, and what was captured before it must be captured again.
    """

    def __init__(
        self, costs: CostModel, config: KnapSpecConfig, device: torch.device | str
    ) -> None:
        """Raises ValueError when config.plan does not fit the model."""
        self._config = config
        self._device = torch.device(device)
        self._curves = curve_tables(costs, self._device, config.draft_length or 1)
        self._forced = config.plan != "auto"
        margin = config.min_speedup - 1.0
        limits = [1.0 + margin, 1.0 + 0.5 * margin]
        if config.always_draft or config.draft_length is not None:
            limits = [-math.inf, -math.inf]  # not even a doubtful choice is declined
        self._thresholds = self._upload([config.hysteresis, *limits])
        self._round_us = config.round_overhead_us or 0.0
        self._corrections = self._upload([1.0, 1.0, 1.0, self._round_us, 1.0])
        # [2] int32: choice of the last round
        self._current = ops.to_device([-1, 0], torch.int32, self._device)
        plans = [Plan.parse(config.plan, costs.num_layers)] if self._forced else []
        self._num_layers = costs.num_layers
        self._plans: tuple[Plan, ...] = ()
        self._install(plans)
        self.set_acceptance(AcceptanceModel(config.prior_weight, config.feedback_half_life))

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans that a choice numbers."""
        return self._plans

    def set_frontier(self, frontier: Frontier, acceptance: AcceptanceModel) -> None:
        """Replaces the plans to choose from; a forced plan stays. Raises ValueError on a misfit.

        acceptance: what is known of the plans, see set_acceptance. The plan of the last round
        stays the current one if the new frontier has it.
        """
        plans = [estimate.plan for estimate in frontier.estimates]
        if any(plan.num_layers != self._num_layers for plan in plans):
            raise ValueError(f"frontier is not for {self._num_layers} layers")
        if not self._forced:
            self._install(plans)
        self.set_acceptance(acceptance)

    def set_acceptance(self, acceptance: AcceptanceModel, context: float | None = None) -> None:
        """Passes on what is known of the plans' acceptance. Call it when its version has grown.

        context: tokens a row of the batches to come; None: acceptance over all lengths.
        """
        values = [acceptance.alpha(plan, context) for plan in self._plans]
        values += [acceptance.lower(plan, context) for plan in self._plans]
        self._alphas.copy_(self._upload(values).reshape(2, -1))

    def set_corrections(self, plain: float, verify: float, draft: float, kept: float = 1.0) -> None:
        """Passes on the batch's factors, all with the pace or none; see Corrections and
        AcceptanceModel.kept."""
        self._corrections.copy_(self._upload([plain, verify, draft, self._round_us, kept]))

    def choose(
        self,
        # [B] int32 or int64
        lengths: torch.Tensor,
        max_draft_length: int,
    ) -> ops.PlanChoice:
        """What to do this round.

        lengths: context tokens of each drafting row, 0 for padding, on the device.
        max_draft_length: what the batch has room for, at most num_speculative_tokens. choice[0] of
        the result numbers `plans`.
        """
        if self._config.draft_length is not None:
            max_draft_length = min(max_draft_length, self._config.draft_length)
        found = ops.plan_tpt(
            self._curves,
            self._counts,
            self._alphas,
            lengths,
            self._corrections,
            self._thresholds,
            self._current,
            max_draft_length=max(max_draft_length, 0),
            paper=self._config.objective == "paper",
        )
        self._current.copy_(found.choice)
        return found

    def _install(self, plans: Sequence[Plan]) -> None:
        """Takes these plans and finds the current one among them, on the device."""
        place = {plan: index for index, plan in reversed(list(enumerate(plans)))}
        # Entry 0 is for "none". A plan that is gone becomes none, its draft length stays: so the
        # threshold is still that of a round after one that drafted, as in Policy.
        moved = [-1, *(place.get(plan, -1) for plan in self._plans)]
        table = ops.to_device(moved, torch.int32, self._device)
        self._current[:1].copy_(table.index_select(0, self._current[:1] + 1))
        self._plans = tuple(plans)
        counts: list[float] = []
        for plan in plans:
            attention = [plan.count("attention", mode) for mode in (Mode.FULL, Mode.WINDOW)]
            counts += [*attention, plan.count("mlp", Mode.FULL)]
        self._counts = self._upload(counts).reshape(-1, 3)
        self._alphas = torch.zeros(2, len(plans), device=self._device)

    def _upload(self, values: Sequence[float]) -> torch.Tensor:
        return ops.to_device(values, torch.float32, self._device)


def curve_tables(
    costs: CostModel, device: torch.device | str, shortest_draft: int = 1
) -> ops.CurveTables:
    """The cost model as tensors. Drafts shorter than shortest_draft are not chosen."""
    parts = (costs.fixed, costs.attention, costs.attention_window, costs.mlp)
    curves = [*parts, *(curve for _, curve in costs.steps)]
    packed = [_segments(curve) for curve in curves]
    longest = max(len(segments) for segments in packed)
    padded = [rows + [(0.0,) * 4] * (longest - len(rows)) for rows in packed]
    first = [[curve.base_us[0], curve.per_row_token_us[0]] for curve in curves]
    tokens = [0] * len(parts) + [tokens for tokens, _ in costs.steps]

    def upload(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return ops.CurveTables(
        segments=upload(padded).permute(2, 0, 1).contiguous().to(device),
        first=upload(first).T.contiguous().to(device),
        tokens=upload(tokens).to(device),
        window_tokens=costs.window_tokens,
        num_layers=costs.num_layers,
        shortest_draft=shortest_draft,
    )


def _segments(curve: Curve) -> list[tuple[float, ...]]:
    """(start, width, slope of base, slope of token) between the curve's grid points, by rows.

    As Curve.at beyond the largest measured batch: the last slopes up to its limit, then the base
    stays and a row's token costs more by as many as there are rows.
    """
    found: list[tuple[float, ...]] = []
    points = list(zip(curve.rows, curve.base_us, curve.per_row_token_us, strict=True))
    for (rows, base, token), (up_rows, up_base, up_token) in pairwise(points):
        width = up_rows - rows
        found.append((rows, width, (up_base - base) / width, (up_token - token) / width))
    limit, token = curve.limit, curve.per_row_token_us[-1]
    if found:
        start, _, slope, token_slope = found[-1]
        token += (limit - curve.rows[-1]) * token_slope
        found[-1] = (start, limit - start, slope, token_slope)
    return [*found, (limit, _ENDLESS, 0.0, token / limit)]
