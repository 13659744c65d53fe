# SPDX-License-Identifier: Apache-2.0
"""Tensor operations of KnapSpec; the only module that imports `knapspec_vllm.kernels`.

Each function checks its arguments and calls the fastest implementation usable on their device.
Today that is the eager twin of `kernels/reference.py` everywhere.
"""

from __future__ import annotations

import torch

import knapspec_vllm.kernels.reference as reference

__all__ = ["branch_attention", "greedy_confidence"]


def branch_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    scale: float,
    prefix_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of N branches over one shared prefix and a private causal tail each.

    query [N, R, Hq, D]; prefix_key and prefix_value [P, Hkv, D], one prefix for all branches, P
    may be 0; tail_key and tail_value [N, R, Hkv, D]; prefix_mask bool [R, P], True = visible, None
    means all. Token r of branch n sees its visible prefix tokens and tail tokens 0..r of branch n,
    in one softmax.

    Returns [N, R, Hq, D] in the dtype of `query`; softmax and sums in float32. Raises ValueError
    for shapes that do not fit together.
    """
    branches, tokens, query_heads, dim = query.shape
    prefix, kv_heads = prefix_key.shape[:2]
    _check("prefix_key", prefix_key, (prefix, kv_heads, dim))
    _check("prefix_value", prefix_value, (prefix, kv_heads, dim))
    _check("tail_key", tail_key, (branches, tokens, kv_heads, dim))
    _check("tail_value", tail_value, (branches, tokens, kv_heads, dim))
    if prefix_mask is not None:
        _check("prefix_mask", prefix_mask, (tokens, prefix))
        if prefix_mask.dtype is not torch.bool:
            raise ValueError(f"prefix_mask is {prefix_mask.dtype}, wanted torch.bool")
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads do not divide into {kv_heads} KV heads")
    return reference.branch_attention(
        query, prefix_key, prefix_value, tail_key, tail_value, scale, prefix_mask
    )


def greedy_confidence(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token of each row of logits [B, V] and its softmax probability.

    Returns token ids `int64` [B] and probabilities `float32` [B]. Raises ValueError unless `logits`
    has two dimensions.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, wanted [B, V]")
    return reference.greedy_confidence(logits)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {shape}")
