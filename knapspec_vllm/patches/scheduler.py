# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.core.sched.scheduler: KV slots for drafted positions in older vLLM."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name
from knapspec_vllm.patches.selection import is_selected


def install() -> None:
    """Wrap Scheduler.__init__ where VllmConfig has no num_lookahead_tokens."""
    if compat.has_lookahead_property():
        return
    patch = by_name("lookahead_scheduler")
    owner, attribute = compat.resolve(patch.target)
    apply.replace(patch.name, owner, attribute, _make_init, patch.seam.parameters)


def _make_init(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = signature.bind(self, *args, **kwargs).arguments["vllm_config"]
        if is_selected(config):
            wanted = config.speculative_config.num_speculative_tokens
            self.num_lookahead_tokens = max(self.num_lookahead_tokens, wanted)

    return __init__
