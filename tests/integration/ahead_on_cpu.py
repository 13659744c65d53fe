# SPDX-License-Identifier: Apache-2.0
"""vLLM schedules nothing ahead on a CPU; here its scheduler and runner are made to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from knapspec_vllm import refusals


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


def schedule_ahead(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """In this process, and in workers that are forked from it. Steps are computed at once."""
    if torch.cuda.is_available():
        return
    replace(refusals, "ASYNC_DEVICES", ("cpu",))
    replace(torch.cuda, "current_stream", lambda *_: _Stream())
    replace(torch.cuda, "stream", lambda _: nullcontext())
    replace(torch.cuda, "Stream", _Stream)
