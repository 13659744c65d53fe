# SPDX-License-Identifier: Apache-2.0
"""Sublayer views of vLLM's decoder models: run one attention or MLP item on its own.

Importing this package imports neither vLLM nor torch, so that config-time checks can ask
which architectures are supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from knapspec_vllm.models.view import SublayerView

#: Architectures (the `architectures` entry of a model's config.json) with a sublayer view.
SUPPORTED_ARCHITECTURES: tuple[str, ...] = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


def bind(target: nn.Module) -> SublayerView:
    """The sublayer view of a loaded vLLM model; raises `UnsupportedModelError`."""
    from knapspec_vllm.models.view import SublayerView

    return SublayerView(target)
