# SPDX-License-Identifier: Apache-2.0
"""Tokens per time (TPT) of a plan and a draft length.

The shape is that of KnapSpec (arXiv 2602.20217, section 4): expected tokens of a round over its
expected time. `paper_tpt` is the published objective; `throughput_tpt` prices what it leaves out:
the batch, the measured cost of verifying several tokens, the fixed part of every draft forward
(head, sampling, launches) and what a round costs on top.
"""

from __future__ import annotations


def expected_tokens(alpha: float, draft_length: int) -> float:
    """Tokens a row gains in a round: (1 - alpha^(g+1)) / (1 - alpha), and g + 1 at alpha = 1.

    alpha: probability that a drafted token is accepted, given those before it were (0..1).
    """
    if not 0.0 <= alpha <= 1.0 or draft_length < 0:
        raise ValueError(f"need 0 <= alpha <= 1 and g >= 0, got {alpha} and {draft_length}")
    # Horner form of 1 + alpha + ... + alpha^g: no cancellation where alpha is close to 1.
    tokens = 1.0
    for _ in range(draft_length):
        tokens = 1.0 + alpha * tokens
    return tokens


def throughput_tpt(
    rows: int,
    alpha: float,
    draft_length: int,
    draft_us: float,
    verify_us: float,
    round_us: float = 0.0,
) -> float:
    """Tokens per microsecond of a batch: rows * E[tokens] / (g * T_draft + T_verify + t_round).

    draft_us: one draft forward of the whole batch, fixed part included. verify_us: the measured
    target step with g + 1 tokens per row. round_us: metadata and bookkeeping of the round.
    """
    time_us = draft_length * draft_us + verify_us + round_us
    return rows * expected_tokens(alpha, draft_length) / time_us


def paper_tpt(alpha: float, draft_length: int, draft_items_us: float, target_us: float) -> float:
    """The published objective (arXiv 2602.20217): batch 1, verify costs one step, items only.

    draft_items_us: sum of the plan's items. target_us: L * (t_attention + t_mlp).
    """
    time_us = draft_length * draft_items_us + target_us
    return expected_tokens(alpha, draft_length) / time_us
