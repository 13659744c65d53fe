# SPDX-License-Identifier: Apache-2.0
"""vllm.config.vllm: refusals at config time, and KV slots for drafted positions."""

from __future__ import annotations

import functools
import logging
from typing import Any

from knapspec_vllm import compat, refusals
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name
from knapspec_vllm.patches.selection import is_selected

logger = logging.getLogger("vllm.knapspec")


def install() -> None:
    """Wrap VllmConfig; every wrapper falls straight through unless KnapSpec is selected."""
    makers = {"refusals": _make_post_init}
    if compat.has_lookahead_property():
        makers["lookahead"] = _make_lookahead
    for name, make in makers.items():
        patch = by_name(name)
        owner, attribute = compat.resolve(patch.target)
        apply.replace(name, owner, attribute, make, patch.seam.parameters)


def _make_post_init(original: Any) -> Any:
    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        selected = is_selected(self)
        asynchronous = False
        if selected:
            refusals.check_before(self)
            # vLLM refuses it with any custom_class; `check_before` has seen that ours can have it.
            asynchronous = _asynchronous(self)
        try:
            if asynchronous:
                self.scheduler_config.async_scheduling = False
                # What vLLM would make of it, were it told.
                if self.parallel_config.disable_nccl_for_dp_synchronization is None:
                    self.parallel_config.disable_nccl_for_dp_synchronization = True
            original(self, *args, **kwargs)
        finally:
            if asynchronous:
                self.scheduler_config.async_scheduling = True
        if asynchronous and self.model_config is not None:
            self.model_config.disable_cascade_attn = True
            logger.info("KnapSpec has vLLM schedule asynchronously, whatever it says above")
        if selected:
            refusals.check(self)

    return __post_init__


def _asynchronous(vllm_config: Any) -> bool:
    """As asked for, and by default wherever KnapSpec can draft under it: plain vLLM has it, and a
    server that declined without had 0.70x and 0.73x of its speed (8B, H200)."""
    asked: bool | None = vllm_config.scheduler_config.async_scheduling
    if asked is not None:
        return asked
    needed = refusals.asynchronous_needs(vllm_config)
    if needed and vllm_config.device_config.device_type in refusals.ASYNC_DEVICES:
        logger.warning(
            "KnapSpec runs without asynchronous scheduling, which needs %s with it: where it "
            "declines, a GPU decodes more slowly than with plain vLLM; compare with knapspec bench",
            needed,
        )
    return needed is None


def _make_lookahead(original: property) -> property:
    assert original.fget is not None
    read = original.fget

    @functools.wraps(read)
    def num_lookahead_tokens(self: Any) -> int:
        lookahead: int = read(self)
        if is_selected(self):
            return max(lookahead, self.speculative_config.num_speculative_tokens)
        return lookahead

    return property(num_lookahead_tokens, doc=original.__doc__)
