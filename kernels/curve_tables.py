# SPDX-License-Identifier: Apache-2.0
"""The planner's cost curves as tensors, and what `plan_tpt` makes of them.

A curve gives a time in microseconds for a number of rows and their mean context:
    base(rows) + token(rows) * context tokens per row
with base and token piecewise linear in rows. Each is stored as its value at the first measured
number of rows plus a sum over segments, slope * clamp(rows - start, 0, width), which needs no
search. Beyond the last segment a curve is flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class CurveTables:
    """Curves 0 to 3: fixed part of a draft forward, FULL attention, WINDOW attention, MLP (items
    of one layer). The others: whole target steps, by tokens per row; at least two of them."""

    # [4, C, N] float32: start (rows), width (rows), slope of base (us), slope of token (us);
    # unused segments are zero
    segments: torch.Tensor
    # [2, C] float32, microseconds: base and token at the first measured number of rows
    first: torch.Tensor
    # [C] float32: tokens per row of a target step, ascending from 1; 0 for curves 0 to 3
    tokens: torch.Tensor
    #: Context tokens of a row that a WINDOW attention reads.
    window_tokens: int
    #: Layers of the model.
    num_layers: int
    #: Shorter drafts are priced but not chosen: how a forced draft length gets here.
    shortest_draft: int = 1


class PlanChoice(NamedTuple):
    """What a round drafts; all on the device."""

    # [2] int32: plan (row of the table) and draft length; -1 and 0 where nothing is drafted
    choice: torch.Tensor
    # [] float32: predicted speedup of the choice, or of the best that was refused; 1 without any
    speedup: torch.Tensor
    # [P, G] float32: predicted speedup of each plan at draft lengths 1 to G
    table: torch.Tensor
