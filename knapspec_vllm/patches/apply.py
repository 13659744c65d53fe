# SPDX-License-Identifier: Apache-2.0
"""Replace one attribute of vLLM: guarded, idempotent, reversible, refusing double patches.

Knows nothing of vLLM; the ledger says what is patched and why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from knapspec_vllm.compat import missing_parameters

#: Set on everything we install, so that a second copy of this package is recognised too.
MARK = "__knapspec_patch__"


class PatchError(RuntimeError):
    """A patch target is not what it was when the patch was written, or is patched already."""


@dataclass(frozen=True)
class Applied:
    """One installed patch and what it took the place of."""

    patch: str
    owner: Any
    attribute: str
    original: Any
    installed: Any


_applied: dict[tuple[str, int, str], Applied] = {}


def replace(
    patch: str,
    owner: Any,
    attribute: str,
    make: Callable[[Any], Any],
    parameters: tuple[str, ...] = (),
) -> bool:
    """Set ``owner.attribute`` to ``make(original)``; True when installed now, False when it was.

    The original is the attribute as stored on `owner` itself or inherited, and may be a function,
    property or staticmethod; `make` returns the same kind. Raises PatchError when the target
    lacks one of `parameters` or carries another patch of the same name.
    """
    key = (patch, id(owner), attribute)
    if key in _applied:  # perhaps wrapped again by others since, but still in place
        return False
    current = inspect.getattr_static(owner, attribute, None)
    if current is None:
        raise PatchError(f"{patch}: {_name(owner)}.{attribute} does not exist")
    if getattr(_function(current), MARK, None) == patch:
        if any(applied.installed is current for applied in _applied.values()):
            return False  # vLLM has carried ours over to an object that it made anew
        raise PatchError(
            f"{patch}: {_name(owner)}.{attribute} is patched already, by another copy of "
            "knapspec_vllm in this process"
        )
    function = _function(current)
    missing = missing_parameters(function, parameters) if callable(function) else list(parameters)
    if missing:
        raise PatchError(
            f"{patch}: {_name(owner)}.{attribute} no longer takes {', '.join(missing)}"
        )
    installed = make(current)
    setattr(_function(installed), MARK, patch)
    setattr(owner, attribute, installed)
    _applied[key] = Applied(patch, owner, attribute, current, installed)
    return True


def installed() -> tuple[str, ...]:
    """Names of the patches in place in this process, in the order they were installed."""
    return tuple(dict.fromkeys(applied.patch for applied in _applied.values()))


def restore_all() -> None:
    """Undo every patch, newest first. For tests and for a start that failed half-way.

    Something patched again by others since then is left alone: undoing ours would undo theirs.
    """
    for key, applied in reversed(list(_applied.items())):
        if inspect.getattr_static(applied.owner, applied.attribute, None) is applied.installed:
            setattr(applied.owner, applied.attribute, applied.original)
        del _applied[key]


def _function(attribute: Any) -> Any:
    """The plain function inside a property, staticmethod or classmethod."""
    if isinstance(attribute, property):
        return attribute.fget
    return getattr(attribute, "__func__", attribute)


def _name(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner))))
