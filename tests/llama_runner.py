# SPDX-License-Identifier: Apache-2.0
"""A Llama checkpoint in plain torch that solvers can run, and that judges their plans.

No vLLM and no kernels: RoPE, grouped-query attention, SiLU MLP and head are written out. A `Text`
holds the target's keys and values of a whole text; a `LlamaRunner` is a stretch of it: the protocol
of planner/solver.py (many branches over a shared prefix) and that of published_solver.py (packed
paths under a mask). Inside the stretch a branch sees its own keys and values, before it the
target's, as in drafting.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from knapspec_vllm.planner.types import Mode, Plan

LOGIT_ROWS = 128
"""Rows of logits computed at once: 128 x 49,152 float32 are 25 MB."""


@dataclass(frozen=True)
class LayerWeights:
    """Projections as [out, in], the ones of equal input joined; norms as [d]."""

    norm_attention: Tensor
    qkv: Tensor
    o: Tensor
    norm_mlp: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaModel:
    """Weights of a LlamaForCausalLM folder (config.json and safetensors) in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        config = json.loads((folder / "config.json").read_text())
        rope = config["rope_parameters"]
        if config["architectures"] != ["LlamaForCausalLM"] or rope["rope_type"] != "default":
            raise ValueError(f"{folder} is no plain Llama: {config['architectures']}, {rope}")
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights.update(load_file(file))
        weights = {name.removeprefix("model."): w.to(dtype) for name, w in weights.items()}
        self.dtype = dtype
        self.num_layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.norm_eps: float = config["rms_norm_eps"]
        self._theta: float = rope["rope_theta"]
        self._embedding = weights["embed_tokens.weight"]
        self._final_norm = weights["norm.weight"]
        self._head = self._embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
        self.layers = [self._layer(weights, f"layers.{i}.") for i in range(self.num_layers)]

    @staticmethod
    def _layer(weights: dict[str, Tensor], prefix: str) -> LayerWeights:
        def joined(*names: str) -> Tensor:
            return torch.cat([weights[f"{prefix}{name}.weight"] for name in names])

        return LayerWeights(
            norm_attention=joined("input_layernorm"),
            qkv=joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=joined("self_attn.o_proj"),
            norm_mlp=joined("post_attention_layernorm"),
            gate_up=joined("mlp.gate_proj", "mlp.up_proj"),
            down=joined("mlp.down_proj"),
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return self._embedding[tokens]

    def norm(self, states: Tensor, weight: Tensor) -> Tensor:
        """RMS norm; the variance in float32."""
        x = states.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.norm_eps)
        return weight * x.to(self.dtype)

    def project(
        self,
        layer: int,
        # [T, d]
        states: Tensor,
        # [T] int64
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, heads, hd] and keys, and values, both [T, kv_heads, hd]."""
        weights = self.layers[layer]
        joined = F.linear(self.norm(states, weights.norm_attention), weights.qkv)
        joined = joined.view(len(states), -1, self.head_dim)
        query, key, value = joined.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        half = self.head_dim // 2
        frequency = self._theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = positions[:, None].float() * frequency
        cos, sin = (table[:, None].to(self.dtype) for table in (angles.cos(), angles.sin()))
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def mlp(self, layer: int, states: Tensor) -> Tensor:
        """Streams after the MLP, residual included; states [..., d]."""
        weights = self.layers[layer]
        joined = F.linear(self.norm(states, weights.norm_mlp), weights.gate_up)
        gate, up = joined.chunk(2, dim=-1)
        return states + F.linear(F.silu(gate) * up, weights.down)

    def logits(self, states: Tensor) -> Tensor:
        """[..., vocabulary] in the model's dtype."""
        return F.linear(self.norm(states, self._final_norm), self._head)

    def attend(
        self,
        # [T, heads, hd]
        query: Tensor,
        # [kv_heads, S, hd]
        key: Tensor,
        value: Tensor,
        # [T, S], added to the scores; None: causal, with S = T
        mask: Tensor | None,
    ) -> Tensor:
        """[T, heads * hd]."""
        groups = self.heads // self.kv_heads
        # Repeated by hand: with enable_gqa torch's CPU attention leaves its fast path.
        key, value = (x.repeat_interleave(groups, dim=0).unsqueeze(0) for x in (key, value))
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0), key, value, attn_mask=mask, is_causal=mask is None
        )
        return out[0].transpose(0, 1).reshape(len(query), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, heads, hd]; cos, sin: [T, 1, hd / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Text:
    """The target's pass over a text: what a server has in its K/V cache."""

    @torch.no_grad()
    def __init__(self, model: LlamaModel, tokens: Sequence[int]) -> None:
        self.model = model
        self.tokens = torch.tensor(tokens)
        self.keys: list[Tensor] = []
        """Per layer [kv_heads, T, hd]."""
        self.values: list[Tensor] = []
        states = model.embed(self.tokens)
        positions = torch.arange(len(tokens))
        for layer in range(model.num_layers):
            query, key, value = model.project(layer, states, positions)
            self.keys.append(key.transpose(0, 1).contiguous())
            self.values.append(value.transpose(0, 1).contiguous())
            out = model.attend(query, self.keys[-1], self.values[-1], None)
            states = states + F.linear(out, model.layers[layer].o)
            states = model.mlp(layer, states)
        self.states = states
        """[T, d] after the last layer."""


class LlamaRunner:
    """Tokens start .. stop - 1 of a text as reference tokens of one row."""

    def __init__(
        self, text: Text, start: int, stop: int, window: int = 512, sinks: int = 64
    ) -> None:
        """window, sinks: what WINDOW sees, the newest `window` keys and the first `sinks`."""
        self.model = text.model
        self.num_layers = text.model.num_layers
        self.prefix = start
        self._tokens = text.tokens[start:stop]
        self._positions = torch.arange(start, stop)
        self._keys = [key[:, :start].contiguous() for key in text.keys]
        self._values = [value[:, :start].contiguous() for value in text.values]
        key, query = torch.arange(stop), self._positions[:, None]
        causal = key <= query
        # [R, prefix + R]
        self._masks = causal, causal & ((key < sinks) | (key > query - window))

    def reference_states(self) -> Tensor:
        return self.model.embed(self._tokens)

    def attention(self, layer: int, states: Tensor, window: bool) -> tuple[Tensor, Tensor | None]:
        number, tokens, width = states.shape
        positions = self._positions.repeat(number)
        query, key, value = self.model.project(layer, states.view(-1, width), positions)
        # Grouped by key head, then branch: the prefix is read once for all branches.
        shape = (number, tokens, self.model.kv_heads, -1, self.model.head_dim)
        query = query.reshape(shape).permute(2, 0, 3, 1, 4)
        key, value = (x.reshape(shape).squeeze(3).permute(2, 0, 1, 3) for x in (key, value))
        past = query.flatten(1, 3) @ self._keys[layer].transpose(1, 2)
        own = query.flatten(2, 3) @ key.transpose(2, 3)
        past, own = (part.view(*query.shape[:4], -1) for part in (past, own))
        scores = torch.cat([past, own], dim=-1).mul_(self.model.head_dim**-0.5)
        full, narrow = self._masks
        masks = (full, narrow) if window else (full,)
        after = [states + self._weighted(layer, scores, value, mask) for mask in masks]
        return after[0], after[1] if window else None

    def _weighted(self, layer: int, scores: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """scores: [kv_heads, N, groups, R, prefix + R]; value: [kv_heads, N, R, hd] -> [N, R, d]"""
        heads, number, groups, tokens, _ = scores.shape
        shares = scores.masked_fill(~mask, -torch.inf).float().softmax(dim=-1).to(scores.dtype)
        past, own = shares.split([self.prefix, tokens], dim=-1)
        out = (past.flatten(1, 3) @ self._values[layer]).view(heads, number, groups, tokens, -1)
        out = out + (own.flatten(2, 3) @ value).view(out.shape)
        out = out.permute(1, 3, 0, 2, 4).reshape(number, tokens, -1)
        return F.linear(out, self.model.layers[layer].o)

    def masked_attention(
        self, layer: int, states: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        query, key, value = self.model.project(layer, states, positions)
        key = torch.cat([self._keys[layer], key.transpose(0, 1)], dim=1)
        value = torch.cat([self._values[layer], value.transpose(0, 1)], dim=1)
        out = self.model.attend(query, key, value, mask)
        return states + F.linear(out, self.model.layers[layer].o)

    def mlp(self, layer: int, states: Tensor) -> Tensor:
        return self.model.mlp(layer, states)

    def top1(self, states: Tensor) -> Tensor:
        parts = states.reshape(-1, states.shape[-1]).split(LOGIT_ROWS)
        tokens = [self.model.logits(part).argmax(dim=-1) for part in parts]
        return torch.cat(tokens).view(states.shape[:-1])


@torch.no_grad()
def run_plans(runner: LlamaRunner, plans: Sequence[Plan]) -> Tensor:
    """Final states of plans, [len(plans), R, d]; what plans have in common runs once."""
    states = runner.reference_states().unsqueeze(0)
    rows = [0] * len(plans)
    for item in range(2 * runner.num_layers):
        steps = [(plan.modes[item], row) for plan, row in zip(plans, rows, strict=True)]
        distinct = sorted(set(steps))
        parts = []
        for mode in Mode:
            parents = [row for step, row in distinct if step is mode]
            if parents:
                parts.append(_step(runner, item, mode, states[parents]))
        states = torch.cat(parts)
        number = {step: row for row, step in enumerate(distinct)}
        rows = [number[step] for step in steps]
    return states[rows]


def _step(runner: LlamaRunner, item: int, mode: Mode, states: Tensor) -> Tensor:
    if mode is Mode.SKIP:
        return states
    if item % 2:
        return runner.mlp(item // 2, states)
    full, window = runner.attention(item // 2, states, mode is Mode.WINDOW)
    return full if window is None else window


@torch.no_grad()
def judge(runner: LlamaRunner, plans: Sequence[Plan], at_once: int = 32) -> list[int]:
    """Tokens of the runner's stretch on which each plan's most likely next token is the target's.

    at_once bounds memory: plans run together.
    """
    target = runner.top1(run_plans(runner, [Plan.full(runner.num_layers)]))
    hits = []
    for first in range(0, len(plans), at_once):
        tokens = runner.top1(run_plans(runner, plans[first : first + at_once]))
        hits += (tokens == target).sum(dim=1).tolist()
    return hits
