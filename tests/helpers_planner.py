# SPDX-License-Identifier: Apache-2.0
"""A Llama-like decoder in plain torch that the solver can run: shape, weights and text are free.

The runner follows the protocol of planner/solver.py: a prefix shared by all branches whose keys
and values come from the full model, and reference tokens of which each branch has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerWeights:
    """Projections as [out, in]; norms as [d]."""

    norm_attention: Tensor
    norm_mlp: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass
class TinyModel:
    layers: list[LayerWeights]
    embedding: Tensor  # [vocab, d]
    final_norm: Tensor  # [d]
    head: Tensor  # [vocab, d]
    heads: int
    kv_heads: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.layers[0].q.shape[0] // self.heads


def random_model(
    seed: int,
    num_layers: int,
    item_scales: list[float] | None = None,
    d: int = 32,
    vocab: int = 64,
) -> TinyModel:
    """Random weights. item_scales: size of each of the 2L items' contribution to the stream;
    None draws them log-uniformly from 0.03..1.0, so that items matter variously."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)

    if item_scales is None:
        exponents = torch.rand(2 * num_layers, generator=generator)
        item_scales = (0.03 ** (1.0 - exponents)).tolist()
    layers = [
        LayerWeights(
            norm_attention=torch.ones(d),
            norm_mlp=torch.ones(d),
            q=normal(d, d),
            k=normal(d // 2, d),
            v=normal(d // 2, d),
            o=normal(d, d, 2.0 * item_scales[2 * i]),
            gate=normal(2 * d, d, 2.0),
            up=normal(2 * d, d, 2.0),
            down=normal(d, 2 * d, item_scales[2 * i + 1]),
        )
        for i in range(num_layers)
    ]
    embedding = torch.randn(vocab, d, generator=generator)
    return TinyModel(layers, embedding, torch.ones(d), normal(vocab, d), heads=4, kv_heads=2)


class TorchRunner:
    """BranchRunner over a TinyModel. tokens: [rows, T] int64, the last R of each are references."""

    def __init__(
        self,
        model: TinyModel,
        tokens: Tensor,
        reference_tokens: int,
        window: int = 8,
        sink: int = 2,
    ) -> None:
        self.model = model
        self.num_layers = len(model.layers)
        self.rows, total = tokens.shape
        self.reference_tokens = reference_tokens
        self.prefix = total - reference_tokens
        self.tokens = tokens
        self._rope = self._rope_table(total)
        self._masks = self._visible(window, sink)
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._fill_cache()

    def reference_states(self) -> Tensor:
        states = self.model.embedding[self.tokens[:, self.prefix :]]
        return states.reshape(self.rows * self.reference_tokens, -1)

    def attention(self, layer: int, states: Tensor, window: bool) -> tuple[Tensor, Tensor | None]:
        weights = self.model.layers[layer]
        branches, packed, _ = states.shape
        shape = (branches, self.rows, self.reference_tokens, -1, self.model.head_dim)
        x = self._norm(states, weights.norm_attention)
        rope = self._rope[:, self.prefix :]
        q = self._rotate((x @ weights.q.T).view(shape), rope)
        k = self._rotate((x @ weights.k.T).view(shape), rope)
        v = (x @ weights.v.T).view(shape)
        full_mask, window_mask = self._masks
        full = self._attend(layer, q, k, v, full_mask).reshape(branches, packed, -1)
        after_full = states + full @ weights.o.T
        if not window:
            return after_full, None
        windowed = self._attend(layer, q, k, v, window_mask).reshape(branches, packed, -1)
        return after_full, states + windowed @ weights.o.T

    def mlp(self, layer: int, states: Tensor) -> Tensor:
        weights = self.model.layers[layer]
        x = self._norm(states, weights.norm_mlp)
        hidden = torch.nn.functional.silu(x @ weights.gate.T) * (x @ weights.up.T)
        return states + hidden @ weights.down.T

    def logits(self, states: Tensor) -> Tensor:
        return self._norm(states, self.model.final_norm) @ self.model.head.T

    def top1(self, states: Tensor) -> Tensor:
        return self.logits(states).argmax(dim=-1)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q: [N, S, R, heads, hd]; k, v: [N, S, R, kv_heads, hd]; mask: [R, P + R]."""
        past_k, past_v = self._cache[layer]
        groups = self.model.heads // self.model.kv_heads
        n, s, r, _, hd = q.shape
        q = q.view(n, s, r, self.model.kv_heads, groups, hd) / math.sqrt(hd)
        past = torch.einsum("nsrkgh,spkh->nskgrp", q, past_k)
        own = torch.einsum("nsrkgh,nstkh->nskgrt", q, k)
        scores = torch.cat([past, own], dim=-1).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1)
        past_weights, own_weights = weights[..., : past_k.shape[1]], weights[..., past_k.shape[1] :]
        out = torch.einsum("nskgrp,spkh->nsrkgh", past_weights, past_v)
        return out + torch.einsum("nskgrt,nstkh->nsrkgh", own_weights, v)

    def _fill_cache(self) -> None:
        """Runs the full model over the prefix."""
        model = self.model
        states = model.embedding[self.tokens[:, : self.prefix]]
        causal = torch.ones(self.prefix, self.prefix, dtype=torch.bool).tril()
        rope = self._rope[:, : self.prefix]
        for layer, weights in enumerate(model.layers):
            x = self._norm(states, weights.norm_attention)
            shape = (self.rows, self.prefix, -1, model.head_dim)
            q = self._rotate((x @ weights.q.T).view(shape), rope)
            k = self._rotate((x @ weights.k.T).view(shape), rope)
            v = (x @ weights.v.T).view(shape)
            self._cache.append((k, v))
            groups = model.heads // model.kv_heads
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2).repeat_interleave(groups, dim=1),
                v.transpose(1, 2).repeat_interleave(groups, dim=1),
                attn_mask=causal,
            )
            out = out.transpose(1, 2).reshape(self.rows, self.prefix, -1)
            states = self.mlp(layer, states + out @ weights.o.T)

    def _visible(self, window: int, sink: int) -> tuple[Tensor, Tensor]:
        """[R, P + R] masks of keys a reference token sees, full and windowed."""
        key = torch.arange(self.prefix + self.reference_tokens)
        query = key[self.prefix :, None]
        causal = key <= query
        return causal, causal & ((key < sink) | (key > query - window))

    def _rope_table(self, total: int) -> Tensor:
        """[2, total, hd / 2]: cosines and sines."""
        half = self.model.head_dim // 2
        frequency = self.model.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(total, dtype=torch.float32)[:, None] * frequency
        return torch.stack([angles.cos(), angles.sin()])

    def _norm(self, states: Tensor, weight: Tensor) -> Tensor:
        variance = states.square().mean(dim=-1, keepdim=True)
        return states * torch.rsqrt(variance + self.model.norm_eps) * weight

    @staticmethod
    def _rotate(x: Tensor, rope: Tensor) -> Tensor:
        """x: [..., tokens, heads, hd]."""
        cos, sin = rope[0][:, None, :], rope[1][:, None, :]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def branches_run(made):
    """Branches of each item that the runner is asked for from now on, one entry an item."""
    sizes = []
    attention, mlp = made.attention, made.mlp
    made.attention = lambda layer, states, window: (
        sizes.append(len(states)),
        attention(layer, states, window),
    )[1]
    made.mlp = lambda layer, states: (sizes.append(len(states)), mlp(layer, states))[1]
    return sizes
