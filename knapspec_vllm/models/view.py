# SPDX-License-Identifier: Apache-2.0
"""Run single sublayers of a vLLM decoder model with vLLM's own code.

The four supported families share one block: two pre-norms, attention, MLP, and residual adds
that are folded into the *next* norm (`h, residual = norm(delta, residual)`). An item therefore
consists of its norm and its body, and skipping it is not calling either: the pending `delta` is
simply added by the norm of the next item that does run.

Each family's own forward runs, over parts that are cheaper to call (`parts.py`). Weights are never
touched: vLLM's CPU backend empties packed ones, quantised layers have no plain weight, and the
tensor-parallel collectives live inside `o_proj`, `down_proj`, the embedding and the head. That is
also why this works under TP unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from knapspec_vllm.models import parts

#: Attributes a decoder layer must have, and where a layer's attention core lives.
_LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")

#: query [T, Hq*D], key [T, Hkv*D], value [T, Hkv*D] -> attention output [any, Hq*D]
AttentionCore = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class UnsupportedModelError(ValueError):
    """The model's decoder layers are not of a kind that can be run item by item."""


class SublayerView:
    """Item-wise access to a loaded vLLM model.

    Hidden states travel as vLLM's pair (delta, residual), each [T, d] in the model's dtype; delta
    is the output of the last executed item, not yet added, or None when there is none. Norms may
    overwrite both tensors in place, so callers must not keep references across calls.

    Raises:
        UnsupportedModelError: the model is not one of the supported families.
    """

    def __init__(self, target: nn.Module, fused: bool = True) -> None:
        """fused=False calls vLLM's modules as they are: equal to the model's own forward bit for
        bit where that is not compiled."""
        core = getattr(target, "model", None)
        layers = getattr(core, "layers", None)
        if core is None or layers is None or not hasattr(target, "compute_logits"):
            raise UnsupportedModelError(
                f"{type(target).__name__} has no `model.layers`: KnapSpec needs a decoder model"
            )
        for index, layer in enumerate(layers):
            missing = [part for part in _LAYER_PARTS if not hasattr(layer, part)]
            if missing or getattr(layer, "ada_rms_norm_t_cond", None) is not None:
                raise UnsupportedModelError(
                    f"layer {index} of {type(target).__name__} is a {type(layer).__name__} "
                    f"{'without ' + ', '.join(missing) if missing else 'with a conditioned norm'}: "
                    "KnapSpec cannot run its attention and MLP separately"
                )
        self.target = target
        self.core: Any = core
        self.layers: list[Any] = list(layers)
        norm = parts.norm if fused else parts.module_norm
        self._final_norm = norm(core.norm)
        self._norms = [
            (norm(layer.input_layernorm), norm(layer.post_attention_layernorm))
            for layer in self.layers
        ]
        self._attentions = [_attention_twin(layer.self_attn, fused) for layer in self.layers]
        self._mlps = [_mlp_twin(layer.mlp) if fused else layer.mlp for layer in self.layers]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] int64 -> [T, d]."""
        return self.core.embed_input_ids(token_ids)

    def attention(
        self,
        layer: int,
        # [T] int64
        positions: torch.Tensor,
        # [T, d] or None
        delta: torch.Tensor | None,
        # [T, d]
        residual: torch.Tensor,
        core: AttentionCore | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Item 2*layer -> (delta, residual).

        Between vLLM's QKV and rotary and its output projection runs vLLM's attention backend, in a
        forward context, or the caller's `core`. A core may return more rows than it got (several
        attention modes from one QKV pass): the output projection, and delta, then have them too.
        """
        hidden, residual = self._norms[layer][0](delta, residual)
        block = self._attentions[layer]
        vars(block)["attn"] = core or self.attention_layer(layer)
        return block.forward(positions=positions, hidden_states=hidden), residual

    def mlp(
        self, layer: int, delta: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Item 2*layer + 1 -> (delta, residual)."""
        hidden, residual = self._norms[layer][1](delta, residual)
        return self._mlps[layer].forward(hidden), residual

    def final_hidden(self, delta: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """The model's output states [T, d] (after the final norm)."""
        return self._final_norm(delta, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, d] -> [T, V] on every tensor-parallel rank."""
        return self.target.compute_logits(hidden)  # type: ignore[operator]

    def attention_layer(self, layer: int) -> Any:
        """The vLLM `Attention` module of a layer (cache, scale and backend)."""
        return self.layers[layer].self_attn.attn


def _attention_twin(attention: Any, fused: bool) -> Any:
    """Every core is put into a twin: the model's own attention module stays as it is."""
    if not fused:
        return parts.twin(attention)
    exchanged = {"qkv_proj": parts.linear, "rotary_emb": parts.rotary, "o_proj": parts.linear}
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            exchanged[name] = parts.head_norm
    return parts.twin(
        attention, **{name: part(getattr(attention, name)) for name, part in exchanged.items()}
    )


def _mlp_twin(mlp: Any) -> Any:
    """An MLP of another make stays the module it is."""
    names = {"gate_up_proj": parts.linear, "act_fn": parts.activation, "down_proj": parts.linear}
    if not all(hasattr(mlp, name) for name in names):
        return mlp
    return parts.twin(mlp, **{name: part(getattr(mlp, name)) for name, part in names.items()})
