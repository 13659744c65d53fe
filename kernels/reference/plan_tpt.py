# SPDX-License-Identifier: Apache-2.0
"""Eager twin of `plan_tpt`: the rules of planner/policy.py as tensor operations."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.curve_tables import CurveTables, PlanChoice


def plan_tpt(
    curves: CurveTables,
    # [P, 3] float32: items that run as FULL attention, WINDOW attention, MLP
    counts: torch.Tensor,
    # [2, P] float32: acceptance, mean and cautious
    alphas: torch.Tensor,
    # [B] int32 or int64: context tokens of each drafting row, 0 for padding
    lengths: torch.Tensor,
    # [5] float32: factors of plain steps, verify steps and drafts, microseconds a round, and the
    # share of the promised tokens that is kept
    corrections: torch.Tensor,
    # [3] float32: hysteresis, speedup to start at, speedup to stay at
    thresholds: torch.Tensor,
    # [2] int32: plan (-1: none) and draft length (0: did not draft) of the last round
    current: torch.Tensor,
    *,
    max_draft_length: int,
    paper: bool,
) -> PlanChoice:
    """Speedup of every plan and draft length, and the choice among them.

    Refused: a speedup under the threshold, and, when the last round did not draft, a choice that
    at the cautious acceptance would not reach 1 (or the threshold to start at, if that is less).
    A current plan that is out of range with a draft length above 0 means that the last round
    drafted with a plan that is gone.
    """
    plans, longest = len(counts), max_draft_length
    rows = (lengths > 0).sum()
    plain_us, verify_us, fixed_us, items_us = _prices(curves, rows, lengths, longest, paper)
    draft_us = fixed_us + (counts * items_us).sum(-1)
    if not paper:
        plain_us = plain_us * corrections[0]
        verify_us = verify_us * corrections[1] + corrections[3]
        draft_us = draft_us * corrections[2]
    draft_lengths = torch.arange(1, longest + 1, device=counts.device)
    rate = plain_us / (draft_lengths * draft_us[:, None] + verify_us)
    # a + ... + a^g as a sum of positive terms: no cancellation where a is close to 1.
    accepted = alphas[..., None].pow(draft_lengths).cumsum(-1)
    if not paper:
        accepted = accepted * corrections[4]
    table, cautious = (1.0 + accepted) * rate
    if not plans or not longest:
        nothing = current.new_full((2,), -1)
        nothing[1:].zero_()
        return PlanChoice(nothing, table.new_ones(()), table)

    shortest = min(curves.shortest_draft, longest)
    width = longest - shortest + 1
    offered, doubted = (part[:, shortest - 1 :].flatten() for part in (table, cautious))
    hysteresis, start, stay = thresholds.unbind()
    plan, length = current.long().unbind()
    best = offered.argmax()
    known = (plan >= 0) & (plan < plans) & (length >= shortest) & (length <= longest)
    kept = torch.where(known, plan * width + length - shortest, best)
    better = offered.take(best) > offered.take(kept) * (1.0 + hysteresis)
    chosen = torch.where(better, best, kept)
    speedup = offered.take(chosen)
    drafted = length > 0
    refused = (speedup < torch.where(drafted, stay, start)) | (rows == 0)
    refused |= ~drafted & (doubted.take(chosen) < start.clamp_max(1.0))
    choice = torch.stack([chosen // width, chosen % width + shortest])
    none = torch.stack([rows.new_full((), -1), rows.new_zeros(())])
    return PlanChoice(torch.where(refused, none, choice).int(), speedup, table)


def _prices(
    curves: CurveTables, rows: torch.Tensor, lengths: torch.Tensor, longest: int, paper: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Microseconds: plain step [], verify steps [longest], fixed part [], items [3]."""
    rows, context = rows.clamp_min(1), lengths.clamp_min(0).sum()
    context_per_row = context / rows
    starts, widths, *slopes = curves.segments
    inside = (rows - starts).clamp_min(0).minimum(widths)
    base = curves.first[0] + (inside * slopes[0]).sum(-1)
    token = curves.first[1] + (inside * slopes[1]).sum(-1)
    attention = base[1] + token[1] * context_per_row
    windowed = base[2] + token[2] * curves.window_tokens
    # A window that covers the whole context is FULL, as in CostModel.item_us.
    window = torch.where(rows * curves.window_tokens < context, windowed, attention)
    items_us = torch.stack([attention, window, base[3]])
    if paper:
        target_us = curves.num_layers * (attention + base[3])
        return target_us, target_us.expand(longest), torch.zeros_like(base[0]), items_us
    steps_us = base[4:] + token[4:] * context_per_row
    return steps_us[0], _verify_us(steps_us, curves.tokens[4:], longest), base[0], items_us


def _verify_us(steps_us: torch.Tensor, tokens: torch.Tensor, longest: int) -> torch.Tensor:
    """Target steps with 2 to longest + 1 tokens per row, as CostModel.step_us prices them."""
    steps_us = steps_us.cummax(0).values
    widths = tokens.diff()
    slopes = steps_us.diff() / widths
    fed = torch.arange(2, longest + 2, device=tokens.device)[:, None]
    # Flat from 1 to the next measured number, then linear, the last slope without end.
    inside = (fed - tokens[1:-1]).clamp_min(0).minimum(widths[1:])
    beyond = (fed[:, 0] - tokens[-1]).clamp_min(0) * slopes[-1]
    return steps_us[1] + (inside * slopes[1:]).sum(-1) + beyond
