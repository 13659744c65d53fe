# SPDX-License-Identifier: Apache-2.0
"""Differences and sums of nested counters: numbers in dicts and lists, anything else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def difference(after: Any, before: Any) -> Any:
    """What was counted between two states; what `before` lacks counts from 0.

    A value that is not a number (a name, None, a truth value) is taken from `after`.
    """
    if isinstance(after, Mapping):
        earlier = before if isinstance(before, Mapping) else {}
        return {name: difference(value, earlier.get(name)) for name, value in after.items()}
    if isinstance(after, list):
        begun = before if isinstance(before, list) else []
        return [difference(v, begun[i] if i < len(begun) else None) for i, v in enumerate(after)]
    if is_number(after) and is_number(before):
        return after - before
    return after


def total(first: Any, second: Any) -> Any:
    """Sum of two differences; a part that only one of them has is kept, the later name wins."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        names = [*first, *(name for name in second if name not in first)]
        return {name: total(first.get(name), second.get(name)) for name in names}
    if isinstance(first, list) and isinstance(second, list):
        length = max(len(first), len(second))
        padded = [values + [None] * (length - len(values)) for values in (first, second)]
        return [total(a, b) for a, b in zip(*padded, strict=True)]
    if is_number(first) and is_number(second):
        return first + second
    return first if second is None else second


def is_number(value: Any) -> bool:
    """A truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
