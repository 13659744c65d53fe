# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.core.sched.scheduler: the moment a scheduler knows whether KnapSpec was selected."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name
from knapspec_vllm.patches.selection import is_selected


def install() -> None:
    """Wrap Scheduler.__init__."""
    patch = by_name("scheduler_start")
    owner, attribute = compat.resolve(patch.target)
    apply.replace(patch.name, owner, attribute, _make_init, patch.seam.parameters)


def _make_init(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = signature.bind(self, *args, **kwargs).arguments["vllm_config"]
        if not is_selected(config):
            return
        if not compat.has_lookahead_property():
            wanted = config.speculative_config.num_speculative_tokens
            self.num_lookahead_tokens = max(self.num_lookahead_tokens, wanted)
        if config.scheduler_config.async_scheduling:
            from knapspec_vllm.patches import async_scheduler

            async_scheduler.install()
            if config.parallel_config.distributed_executor_backend not in (None, "uni"):
                async_scheduler.relay(self, config)

    return __init__
