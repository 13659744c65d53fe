# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.worker.worker_base: the moment a worker knows whether KnapSpec was selected."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name
from knapspec_vllm.patches.selection import is_selected


def install() -> None:
    """Wrap WorkerBase.__init__; nothing of the model runner is imported before it runs."""
    patch = by_name("worker_start")
    owner, attribute = compat.resolve(patch.target)
    apply.replace(patch.name, owner, attribute, _make_init, patch.seam.parameters)


def _make_init(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config = signature.bind(self, *args, **kwargs).arguments["vllm_config"]
        if is_selected(config):
            from knapspec_vllm.patches import install_in_worker

            install_in_worker(type(self))
        original(self, *args, **kwargs)

    return __init__
