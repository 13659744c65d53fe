# SPDX-License-Identifier: Apache-2.0
"""What happens to a batch between two draft forwards."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.draft_state import DraftState
from knapspec_vllm.ops.dispatch import check, run


def draft_start(state: DraftState) -> None:
    """Prepare a round in place: lengths, slots and windows of the rows' positions."""
    run("draft_advance", state.tokens, state, name="draft_start")


def draft_advance(
    state: DraftState, token_ids: torch.Tensor, confidence: torch.Tensor, *, threshold: float
) -> None:
    """Take one drafted token per row, in place: rows that go on advance, the others stay still.

    token_ids [B] int64; confidence [B] float32, top-1 probability: a row stops after a token whose
    confidence is under `threshold`, at its limit, or at the last position a model may have.
    """
    check("token_ids", token_ids, tuple(state.tokens.shape))
    check("confidence", confidence, tuple(state.tokens.shape))
    run("draft_advance", state.tokens, state, token_ids, confidence, threshold=threshold)


def greedy_confidence(
    logits: torch.Tensor, *, confident: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token of each row of logits [B, V] and its softmax probability.

    Returns token ids `int64` [B] and probabilities `float32` [B]; the first of equal logits wins.
    confident=False: nobody reads the probabilities, which may then be 1.0.
    Raises ValueError unless `logits` has two dimensions.
    """
    _check_logits(logits)
    return run("greedy_confidence", logits, logits, confident=confident)


def greedy_partials(
    logits: torch.Tensor, *, first_token: int, valid: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One vocabulary shard's part of `greedy_confidence`.

    logits [B, V_local] of tokens first_token .. first_token + valid - 1; columns from `valid` on
    are padding. Returns ids int64 [B], maximum and sum of exp(logit - maximum), float32 [B].
    """
    _check_logits(logits)
    return run(
        "greedy_confidence",
        logits,
        logits,
        first_token=first_token,
        valid=valid,
        name="greedy_partials",
    )


def merge_greedy(
    token_ids: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and probabilities [B] from the partials [K, B] of K shards in vocabulary order."""
    check("maximum", maximum, tuple(token_ids.shape))
    check("total", total, tuple(token_ids.shape))
    return run("greedy_confidence", maximum, token_ids, maximum, total, name="merge_greedy")


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, wanted [B, V]")
