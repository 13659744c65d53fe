# SPDX-License-Identifier: Apache-2.0
"""What `dp_relax` returns, and the one constant that both of its implementations need."""

from __future__ import annotations

from typing import NamedTuple

import torch

TOLERANCE = 1e-7
"""Differences of saving or error up to this are rounding."""


class Relaxed(NamedTuple):
    """The M branches after one item; row 0 is the target. On the device, never read by the host.

    A row that is not alive holds no plan; after a selection it repeats the target's values. Fields
    may share memory with each other and with the inputs.
    """

    # [M] int32: place in full, window and skip stacked in this order (those that were given)
    rows: torch.Tensor
    # [M] int32: row before the item
    parents: torch.Tensor
    # [M] int32: 0 FULL, 1 WINDOW, 2 SKIP
    modes: torch.Tensor
    # [M] float32: share of the item time saved so far
    saved: torch.Tensor
    # [M] float32: 1 - cosine to the target, mean over the tokens
    error: torch.Tensor
    # [M] bool
    alive: torch.Tensor
