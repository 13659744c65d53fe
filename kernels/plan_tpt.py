# SPDX-License-Identifier: Apache-2.0
"""Tokens per time of every plan and draft length for a batch, and the choice among them.

    speedup[p, g] = (1 + c[4] * (a[p] + ... + a[p]^g)) * plain / (g * draft[p] + verify[g])
    draft[p]  = c[2] * (fixed + counts[p] . (attention, window, mlp))
    plain     = c[0] * step(1),  verify[g] = c[1] * step(1 + g) + c[3]
each curve taken at the batch's rows and mean context (`CurveTables`); step() is non-decreasing,
flat from 1 token to the next measured number of tokens, linear between those and beyond the last.
c are the corrections: what rounds really take over what the curves say, a fixed time a round, and
the share of the promised tokens that is kept.
The published objective (PAPER): fixed = 0, plain = verify = layers * (attention + mlp), no c.

One program computes everything: the table is a few hundred numbers, what counts is the latency of
one launch, and the choice needs all of it. It reads the batch from `lengths`, prices the curves in
one tile, then walks over tiles of plans, keeping the best entry and the one of the last round.
Rows with length 0 are padding and count nowhere; a batch of nothing else is declined. Inputs are
only read and outputs are new tensors, so `current` may be the choice of the last call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from knapspec_vllm.kernels.curve_tables import CurveTables, PlanChoice


# None of these may become part of the compiled kernel's key: they change while a server runs.
@triton.jit(do_not_specialize=["num_rows", "num_plans", "longest", "shortest"])
def _plan_tpt_kernel(
    # [4, C, N] float32
    segments_ptr,
    # [2, C] float32
    first_ptr,
    # [C] float32
    tokens_ptr,
    # [P, 3] float32
    counts_ptr,
    # [2, P] float32
    alphas_ptr,
    # [B] int32 or int64
    lengths_ptr,
    # [5] float32
    corrections_ptr,
    # [3] float32
    thresholds_ptr,
    # [2] int32
    current_ptr,
    # [2] int32
    choice_ptr,
    # [] float32
    speedup_ptr,
    # [P, longest] float32
    table_ptr,
    num_rows,
    num_plans,
    longest,
    shortest,
    WINDOW_TOKENS: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    NUM_CURVES: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK_CURVES: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PLANS: tl.constexpr,
    BLOCK_LENGTHS: tl.constexpr,
):
    # Whatever does not depend on the batch is loaded first: one wait for memory, not three.
    curve = tl.arange(0, BLOCK_CURVES)
    segment = tl.arange(0, BLOCK_SEGMENTS)
    real = curve < NUM_CURVES
    is_step = real & (curve >= 4)
    place = segments_ptr + curve[:, None] * NUM_SEGMENTS + segment[None, :]
    used = real[:, None] & (segment < NUM_SEGMENTS)[None, :]
    PLANE: tl.constexpr = NUM_CURVES * NUM_SEGMENTS
    starts = tl.load(place, mask=used, other=0.0)
    widths = tl.load(place + PLANE, mask=used, other=0.0)
    base_slopes = tl.load(place + 2 * PLANE, mask=used, other=0.0)
    token_slopes = tl.load(place + 3 * PLANE, mask=used, other=0.0)
    first_base = tl.load(first_ptr + curve, mask=real, other=0.0)
    first_token = tl.load(first_ptr + NUM_CURVES + curve, mask=real, other=0.0)
    tokens = tl.load(tokens_ptr + curve, mask=real, other=0.0)
    tokens_before = tl.load(tokens_ptr + curve - 1, mask=is_step, other=0.0)
    hysteresis = tl.load(thresholds_ptr)
    start = tl.load(thresholds_ptr + 1)
    stay = tl.load(thresholds_ptr + 2)
    last_plan = tl.load(current_ptr)
    last_length = tl.load(current_ptr + 1)

    seen = tl.zeros([BLOCK_ROWS], tl.int32)
    read = tl.zeros([BLOCK_ROWS], tl.int64)
    for offset in range(0, num_rows, BLOCK_ROWS):
        row = offset + tl.arange(0, BLOCK_ROWS)
        length = tl.load(lengths_ptr + row, mask=row < num_rows, other=0).to(tl.int64)
        seen += (length > 0).to(tl.int32)
        read += tl.maximum(length, 0)
    drafting = tl.sum(seen, 0)
    context = tl.sum(read, 0)
    rows = tl.maximum(drafting, 1)
    per_row = context.to(tl.float32) / rows.to(tl.float32)

    inside = tl.minimum(tl.maximum(rows.to(tl.float32) - starts, 0.0), widths)
    base = first_base + tl.sum(inside * base_slopes, 1)
    token = first_token + tl.sum(inside * token_slopes, 1)
    # Neither the fixed part (0) nor an MLP (3) reads context, and a window (2) only its own.
    reads = tl.where((curve == 0) | (curve == 3), 0.0, per_row)
    time_us = base + token * tl.where(curve == 2, WINDOW_TOKENS * 1.0, reads)
    fixed_us = tl.sum(tl.where(curve == 0, time_us, 0.0), 0)
    full_us = tl.sum(tl.where(curve == 1, time_us, 0.0), 0)
    window_us = tl.sum(tl.where(curve == 2, time_us, 0.0), 0)
    mlp_us = tl.sum(tl.where(curve == 3, time_us, 0.0), 0)
    window_us = tl.where(rows.to(tl.int64) * WINDOW_TOKENS < context, window_us, full_us)

    column = tl.arange(0, BLOCK_LENGTHS)
    if PAPER:
        fixed_us = 0.0 * fixed_us
        plain_us = NUM_LAYERS * (full_us + mlp_us)
        verify_us = tl.zeros([BLOCK_LENGTHS], tl.float32) + plain_us
    else:
        # Running maximum over the steps; finite, because a difference of infinities is no number.
        step = tl.where(is_step, time_us, -1e30)
        earlier = curve[None, :] < curve[:, None]
        before = tl.max(tl.where(earlier, step[None, :], -1e30), 1)
        here = tl.maximum(step, before)
        width = tl.where(real & (curve >= 5), tokens - tokens_before, 1.0)
        slope = tl.where(real & (curve >= 5), (here - before) / width, 0.0)
        fed = (column + 2).to(tl.float32)[None, :]
        climbed = tl.minimum(tl.maximum(fed - tokens_before[:, None], 0.0), width[:, None])
        climbed = tl.where((curve >= 6)[:, None], climbed, 0.0)
        beyond = tl.maximum(fed - tokens[:, None], 0.0)
        climbed += tl.where((curve == NUM_CURVES - 1)[:, None], beyond, 0.0)
        plain_us = tl.sum(tl.where(curve == 4, time_us, 0.0), 0)
        verify_us = tl.sum(tl.where(curve == 5, here, 0.0), 0)
        verify_us += tl.sum(climbed * slope[:, None], 0)
        plain_us *= tl.load(corrections_ptr)
        verify_us = verify_us * tl.load(corrections_ptr + 1) + tl.load(corrections_ptr + 3)
        draft_factor = tl.load(corrections_ptr + 2)
        fixed_us *= draft_factor
        full_us *= draft_factor
        window_us *= draft_factor
        mlp_us *= draft_factor

    keeps = (last_plan >= 0) & (last_plan < num_plans)
    keeps = keeps & (last_length >= shortest) & (last_length <= longest)
    kept_at = tl.where(keeps, last_plan * BLOCK_LENGTHS + last_length - 1, -1)
    kept = 0.0
    best_at = -1
    best = float("-inf")
    best_cautious = 0.0
    for offset in range(0, num_plans, BLOCK_PLANS):
        plan = offset + tl.arange(0, BLOCK_PLANS)
        known = plan < num_plans
        draft_us = fixed_us + tl.load(counts_ptr + plan * 3, mask=known, other=0.0) * full_us
        draft_us += tl.load(counts_ptr + plan * 3 + 1, mask=known, other=0.0) * window_us
        draft_us += tl.load(counts_ptr + plan * 3 + 2, mask=known, other=0.0) * mlp_us
        mean = tl.load(alphas_ptr + plan, mask=known, other=0.0)[:, None]
        lower = tl.load(alphas_ptr + num_plans + plan, mask=known, other=0.0)[:, None]
        expected = tl.zeros([BLOCK_PLANS, BLOCK_LENGTHS], tl.float32) + 1.0
        doubted = expected
        # Horner form, as in planner/objective.py: no cancellation where acceptance is close to 1.
        for power in range(longest):
            grows = (column >= power)[None, :]
            expected = tl.where(grows, 1.0 + mean * expected, expected)
            doubted = tl.where(grows, 1.0 + lower * doubted, doubted)
        if not PAPER:
            kept_share = tl.load(corrections_ptr + 4)
            expected = 1.0 + kept_share * (expected - 1.0)
            doubted = 1.0 + kept_share * (doubted - 1.0)
        drafts_us = (column + 1).to(tl.float32)[None, :] * draft_us[:, None]
        rate = plain_us / (drafts_us + verify_us[None, :])
        entry = known[:, None] & (column < longest)[None, :]
        where = plan[:, None].to(tl.int64) * longest + column[None, :]
        tl.store(table_ptr + where, expected * rate, mask=entry)

        offered = entry & (column >= shortest - 1)[None, :]
        speedup = tl.where(offered, expected * rate, float("-inf"))
        cautious = doubted * rate
        at = plan[:, None] * BLOCK_LENGTHS + column[None, :]
        top = tl.max(speedup)
        top_at = tl.min(tl.where(speedup == top, at, 2147483647))
        top_cautious = tl.sum(tl.where(at == top_at, cautious, 0.0))
        # Only a larger one replaces: of equals the first wins, as in Python.
        better = top > best
        best_at = tl.where(better, top_at, best_at)
        best_cautious = tl.where(better, top_cautious, best_cautious)
        best = tl.maximum(best, top)
        kept += tl.sum(tl.where(at == kept_at, speedup, 0.0))

    stays = keeps & (best <= kept * (1.0 + hysteresis))
    chosen = tl.where(stays, kept_at, best_at)
    chosen_speedup = tl.where(stays, kept, best)
    drafted = last_length > 0
    # Doubt matters only where nothing was drafted, and then the best is what was chosen.
    doubtful = (best_cautious < tl.minimum(start, 1.0)) & (last_length <= 0)
    refused = (chosen_speedup < tl.where(drafted, stay, start)) | doubtful
    refused = refused | (drafting == 0) | (chosen < 0)
    tl.store(choice_ptr, tl.where(refused, -1, chosen // BLOCK_LENGTHS))
    tl.store(choice_ptr + 1, tl.where(refused, 0, chosen % BLOCK_LENGTHS + 1))
    tl.store(speedup_ptr, tl.where(chosen < 0, 1.0, chosen_speedup))


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
    """Speedup of every plan and draft length, and the choice among them; see the eager twin."""
    plans = counts.shape[0]
    _, num_curves, num_segments = curves.segments.shape
    choice = torch.empty(2, dtype=torch.int32, device=counts.device)
    speedup = torch.empty((), dtype=torch.float32, device=counts.device)
    table = torch.empty(plans, max_draft_length, dtype=torch.float32, device=counts.device)
    _plan_tpt_kernel[(1,)](
        curves.segments,
        curves.first,
        curves.tokens,
        counts.contiguous(),
        alphas.contiguous(),
        lengths.contiguous(),
        corrections.contiguous(),
        thresholds.contiguous(),
        current.contiguous(),
        choice,
        speedup,
        table,
        lengths.shape[0],
        plans,
        max_draft_length,
        max(1, min(curves.shortest_draft, max_draft_length)),
        WINDOW_TOKENS=curves.window_tokens,
        NUM_LAYERS=curves.num_layers,
        NUM_CURVES=num_curves,
        NUM_SEGMENTS=num_segments,
        PAPER=paper,
        BLOCK_CURVES=triton.next_power_of_2(num_curves),
        BLOCK_SEGMENTS=triton.next_power_of_2(num_segments),
        # Fixed sizes, so that a longer batch or draft compiles nothing while a request waits; 16
        # or 32 lengths cover every setting, and 32 plans are the default number of bins.
        BLOCK_ROWS=1024,
        BLOCK_PLANS=32,
        BLOCK_LENGTHS=max(16, triton.next_power_of_2(max_draft_length)),
    )
    return PlanChoice(choice, speedup, table)
