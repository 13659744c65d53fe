# SPDX-License-Identifier: Apache-2.0
"""Fails on anything that would make the host wait for a GPU, without having one.

Two nets. Functions that bring values to the host are replaced by ones that raise. And operators are
watched: those whose result's shape depends on values (nonzero, boolean indexing, unique, ...) and
those that read a scalar (`.item()`, `if tensor`, `int(tensor)`) need the values on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN_OPERATORS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique",
    "aten.unique_",
    "aten.equal",
    "aten.is_nonzero",
    "aten.repeat_interleave.Tensor",
)
FORBIDDEN_METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__array__")


class HostSyncError(AssertionError):
    """The guarded code waited for values."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(FORBIDDEN_OPERATORS):
            raise HostSyncError(f"{name} needs values on the host")
        if name.startswith(("aten.index.", "aten.index_put")):
            indices = args[1]
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise HostSyncError(f"{name} with a boolean mask needs values on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises HostSyncError where the body would wait for the device."""

    def forbidden(name: str):
        def raising(self: torch.Tensor, *args: object, **kwargs: object) -> None:
            raise HostSyncError(f"Tensor.{name} needs values on the host")

        return raising

    patches = [mock.patch.object(torch.Tensor, n, forbidden(n)) for n in FORBIDDEN_METHODS]
    for patch in patches:
        patch.start()
    try:
        with _Watch():
            yield
    finally:
        for patch in patches:
            patch.stop()
