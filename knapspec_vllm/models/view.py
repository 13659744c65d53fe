# SPDX-License-Identifier: Apache-2.0
"""Run single sublayers of a vLLM decoder model with vLLM's own modules.

The four supported families share one block: two pre-norms, attention, MLP, and residual adds
that are folded into the *next* norm (`h, residual = norm(delta, residual)`). An item therefore
consists of its norm and its body, and skipping it is not calling either: the pending `delta` is
simply added by the norm of the next item that does run.

Everything goes through module calls, never through `.weight`: vLLM's CPU backend empties packed
weights, quantised layers have no plain weight, and the tensor-parallel collectives live inside
`o_proj`, `down_proj`, the embedding and the head. That is also why this works under TP unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: Attributes a decoder layer must have, and where a layer's attention core lives.
_LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")

#: query [T, Hq*D], key [T, Hkv*D], value [T, Hkv*D] -> attention output [any, Hq*D]
AttentionCore = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class UnsupportedModelError(ValueError):
    """The model's decoder layers are not of a kind that can be run item by item."""


class _CoreShim(nn.Module):
    """Stands in for a layer's `Attention` module while a caller's core is in use."""

    def __init__(self, core: AttentionCore) -> None:
        super().__init__()
        self.core = core

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.core(query, key, value)


class SublayerView:
    """Item-wise access to a loaded vLLM model.

    Hidden states travel as vLLM's pair (delta, residual), each [T, d] in the model's dtype; delta
    is the output of the last executed item, not yet added, or None when there is none. Norms may
    overwrite both tensors in place, so callers must not keep references across calls.

    Raises:
        UnsupportedModelError: the model is not one of the supported families.
    """

    def __init__(self, target: nn.Module) -> None:
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
        block = self.layers[layer]
        hidden, residual = _norm(block.input_layernorm, delta, residual)
        if core is None:
            return block.self_attn(positions=positions, hidden_states=hidden), residual
        with _swapped_core(block.self_attn, core):
            return block.self_attn(positions=positions, hidden_states=hidden), residual

    def mlp(
        self, layer: int, delta: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Item 2*layer + 1 -> (delta, residual)."""
        block = self.layers[layer]
        hidden, residual = _norm(block.post_attention_layernorm, delta, residual)
        return block.mlp(hidden), residual

    def final_hidden(self, delta: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """The model's output states [T, d] (after the final norm)."""
        return _norm(self.core.norm, delta, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, d] -> [T, V] on every tensor-parallel rank."""
        return self.target.compute_logits(hidden)  # type: ignore[operator]

    def attention_layer(self, layer: int) -> Any:
        """The vLLM `Attention` module of a layer (cache, scale and backend)."""
        return self.layers[layer].self_attn.attn


def _norm(
    norm: Any, delta: torch.Tensor | None, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if delta is None:
        return norm(residual), residual
    return norm(delta, residual)


@contextmanager
def _swapped_core(self_attn: nn.Module, core: AttentionCore) -> Iterator[None]:
    # Swapping the submodule reuses each family's own QKV, q/k-norm, rotary and scaling code instead
    # of copying four of them; the worker runs one thread, and the swap ends with the call.
    original = self_attn._modules["attn"]
    self_attn._modules["attn"] = _CoreShim(core)
    try:
        yield
    finally:
        self_attn._modules["attn"] = original
