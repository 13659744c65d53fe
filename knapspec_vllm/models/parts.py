# SPDX-License-Identifier: Apache-2.0
"""Parts of a decoder layer as plain functions that cost less to call than vLLM's modules.

vLLM serves its modules through a compiled graph. Called one by one, as a draft must, they fall back
to what the graph would have fused: a norm is eight kernels, SiLU-and-multiply three, and each
module call costs Python of its own. One draft forward of SmolLM2-135M took 26.3 ms that way where
the compiled target takes 15.1 (bf16, one row, two AVX-512 cores). vLLM ships the fused kernels on
every platform, though, and the functions here call them directly; whatever is not recognised stays
the module.

They round once where the modules round twice, so in bfloat16 results differ in the last bit. Drafts
only propose: nothing here decides an output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Norm = Callable[[torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(delta [T, d] or None, residual [T, d]) -> (normed, delta + residual); may overwrite both."""


def twin(module: nn.Module, **parts: Any) -> nn.Module:
    """`module` with some parts exchanged: its own forward code, weights shared, nothing copied."""
    # An attribute of the instance is found before a registered submodule of the same name.
    other = copy.copy(module)
    vars(other).update(parts)
    return other


def norm(module: Any) -> Norm:
    """An RMSNorm, alone or with the residual add in front of it."""
    kernels, plain = _fused_kernels(), module_norm(module)
    if kernels is None or not _is_plain_norm(module):
        return plain
    epsilon = module.variance_epsilon

    def fused(
        delta: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = module.weight
        if weight.dtype != residual.dtype:  # the kernels want one type
            return plain(delta, residual)
        if delta is None:
            out = torch.empty_like(residual)
            kernels.rms_norm.default(out, residual, weight, epsilon)
            return out, residual
        kernels.fused_add_rms_norm.default(delta, residual, weight, epsilon)
        return delta, residual

    return fused


def module_norm(module: Any) -> Norm:
    """The same through the module."""

    def call(
        delta: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (module(residual), residual) if delta is None else module(delta, residual)

    return call


def head_norm(module: Any) -> Any:
    """The norm of queries or keys, head by head."""
    if _fused_kernels() is None or not _is_plain_norm(module):
        return module
    fused = norm(module)
    # Queries and keys are slices of one product, and the kernel wants dense rows.
    return lambda x: fused(None, x.contiguous())[0]


def linear(module: Any) -> Any:
    """A linear layer; like vLLM's, it returns (output, None)."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    # `cpu_linear` is looked up at each call: vLLM makes a new one when weights are loaded again.
    simple = (
        hasattr(module, "cpu_linear")
        and isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod)
        and getattr(module, "tp_size", 1) == 1
        and not getattr(module, "skip_bias_add", False)
        and not getattr(module, "gather_output", False)
        and getattr(module, "return_bias", True)
    )
    if not simple:
        return module
    return lambda x: (module.cpu_linear(x, module.weight, module.bias), None)


def activation(module: Any) -> Any:
    """The activation between an MLP's two linear layers."""
    from vllm.model_executor.layers.activation import SiluAndMul

    kernels = _fused_kernels()
    if not isinstance(module, SiluAndMul):
        return module
    if kernels is None:
        return _platform_forward(module)

    def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        kernels.silu_and_mul.default(out, x)
        return out

    return silu_and_mul


def rotary(module: Any) -> Any:
    """Rotary embedding by the platform's kernel, which a compiled vLLM switches off."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    return _platform_forward(module) if isinstance(module, RotaryEmbedding) else module


def _platform_forward(module: Any) -> Any:
    """vLLM's kernel for this platform, whether or not the compiled target uses it."""
    from vllm.platforms import current_platform

    for holds, name in (
        (current_platform.is_rocm(), "forward_hip"),
        (current_platform.is_cuda(), "forward_cuda"),
        (current_platform.is_cpu(), "forward_cpu"),
    ):
        if holds:
            return getattr(module, name)
    return module


def _fused_kernels() -> Any:
    """vLLM's own kernels on CPUs and CUDA, which its modules do not call in a compiled server; None
    elsewhere."""
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return None
    wanted = ("rms_norm", "fused_add_rms_norm", "silu_and_mul")
    return torch.ops._C if all(hasattr(torch.ops._C, name) for name in wanted) else None


def _is_plain_norm(module: Any) -> bool:
    """Whether it scales by a weight of its own and nothing else."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    return (
        type(module) is RMSNorm
        and getattr(module, "has_weight", True)
        and module.variance_size_override is None
    )
