# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: Triton on a GPU or interpreted, else the eager twin."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from knapspec_vllm import envs

launches: Counter[tuple[str, str]] = Counter()
"""Calls by (op, "triton" or "eager"), so that tests and metrics can tell which path ran."""


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels."""
    return (tensor.is_cuda or _interpreted()) and not envs.eager_kernels()


def run(op: str, tensor: torch.Tensor, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
    """Function `name` (default: `op`) of kernels/<op>.py or kernels/reference/<op>.py.

    tensor: the argument whose device decides.
    """
    kind = "triton" if uses_triton(tensor) else "eager"
    launches[name or op, kind] += 1
    return _function(op, kind, name or op)(*args, **kwargs)


@functools.cache
def launch_errors() -> tuple[type[Exception], ...]:
    """What a kernel raises that cannot be compiled, launched or captured here; Triton's own are no
    RuntimeError."""
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, CompilationError, OutOfResources, PTXASError


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError naming the argument unless it has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {shape}")


def to_device(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Host numbers as a tensor on the device, without waiting for what the device is doing."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


@functools.cache
def _interpreted() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _function(op: str, kind: str, name: str) -> Callable[..., Any]:
    folder = "knapspec_vllm.kernels" if kind == "triton" else "knapspec_vllm.kernels.reference"
    return getattr(importlib.import_module(f"{folder}.{op}"), name)
