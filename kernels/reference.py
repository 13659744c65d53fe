# SPDX-License-Identifier: Apache-2.0
"""Eager twins of the kernels: the definition of each op, and the path taken without a GPU.

Written for reading. Sums and softmax are done in float32 whatever the inputs' dtype. No function
here looks at a tensor's values, so all of them run inside a CUDA graph.
"""

from __future__ import annotations

import torch


def branch_attention(
    # [N, R, Hq, D]
    query: torch.Tensor,
    # [P, Hkv, D]
    prefix_key: torch.Tensor,
    # [P, Hkv, D]
    prefix_value: torch.Tensor,
    # [N, R, Hkv, D]
    tail_key: torch.Tensor,
    # [N, R, Hkv, D]
    tail_value: torch.Tensor,
    scale: float,
    # [R, P] bool, True = visible; None = all visible
    prefix_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of N branches over one shared prefix and a private causal tail each.

    Token r of branch n sees the prefix tokens `prefix_mask[r]` allows and tail tokens 0..r of
    branch n, in one softmax. The prefix is read once for all branches: their tokens and the query
    heads of a KV head become the rows of one matrix product per KV head.

    Returns [N, R, Hq, D] in the dtype of `query`.
    """
    branches, tokens, query_heads, dim = query.shape
    prefix, kv_heads, _ = prefix_key.shape
    group = query_heads // kv_heads

    # [Hkv, N, R, G, D]
    folded = (query.float() * scale).view(branches, tokens, kv_heads, group, dim)
    folded = folded.permute(2, 0, 1, 3, 4)
    # [Hkv, N, R, G, R]: each branch against its own tail
    tail_scores = torch.einsum("hnrgd,nshd->hnrgs", folded, tail_key.float())
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    tail_scores = tail_scores.masked_fill(~causal[:, None, :], float("-inf"))
    highest = tail_scores.amax(-1, keepdim=True)  # finite: every token sees itself

    if prefix:
        # [Hkv, N*R*G, P]: all branches against the one prefix
        rows = folded.reshape(kv_heads, branches * tokens * group, dim)
        scores = torch.bmm(rows, prefix_key.float().permute(1, 2, 0))
        scores = scores.view(kv_heads, branches, tokens, group, prefix)
        if prefix_mask is not None:
            scores = scores.masked_fill(~prefix_mask[:, None, :], float("-inf"))
        highest = torch.maximum(highest, scores.amax(-1, keepdim=True))

    tail_weights = torch.exp(tail_scores - highest)
    total = tail_weights.sum(-1, keepdim=True)
    result = torch.einsum("hnrgs,nshd->hnrgd", tail_weights, tail_value.float())
    if prefix:
        weights = torch.exp(scores - highest)
        total = total + weights.sum(-1, keepdim=True)
        rows = weights.view(kv_heads, branches * tokens * group, prefix)
        read = torch.bmm(rows, prefix_value.float().transpose(0, 1))
        result = result + read.view_as(result)
    # [N, R, Hkv, G, D]
    result = (result / total).permute(1, 2, 0, 3, 4)
    return result.reshape(branches, tokens, query_heads, dim).to(query.dtype)


def greedy_confidence(
    # [B, V]
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token of each row and its softmax probability.

    Returns token ids `int64` [B] and probabilities `float32` [B]. The first of equal logits wins.
    """
    values = logits.float()
    token_ids = values.argmax(-1)
    highest = values.gather(-1, token_ids[:, None])
    return token_ids, torch.exp(values - highest).sum(-1).reciprocal()
