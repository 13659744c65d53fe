# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.core.sched: decisions and results where vLLM schedules ahead of the device.

Installed when a scheduler starts that schedules for KnapSpec.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name

#: The AsyncPlanning of each engine, by vLLM's instance id; proposers or schedulers keep them alive.
_plannings: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(vllm_config: Any, planning: Any) -> None:
    """Let this engine's scheduler find its AsyncPlanning."""
    _plannings[vllm_config.instance_id] = planning


def relay(scheduler: Any, vllm_config: Any) -> None:
    """Have this scheduler ask workers in other processes."""
    from knapspec_vllm.draft.async_relay import RelayedAsyncPlanning, RelayHost

    host = RelayHost(vllm_config, scheduler.max_model_len)
    scheduler.knapspec_planning = RelayedAsyncPlanning(host)
    register(vllm_config, scheduler.knapspec_planning)


def install() -> None:
    """Wrap the scheduler's two methods; other engines of the process fall straight through."""
    for name, make in (("async_decision", _make_decision), ("async_feedback", _make_feedback)):
        patch = by_name(name)
        owner, attribute = compat.resolve(patch.target)
        apply.replace(name, owner, attribute, make, patch.seam.parameters)


def _make_decision(original: Any) -> Any:
    @functools.wraps(original)
    def _update_after_schedule(self: Any, scheduler_output: Any) -> Any:
        planning = _plannings.get(self.vllm_config.instance_id)
        if planning is None:
            return original(self, scheduler_output)
        planning.decide(self, scheduler_output)
        result = original(self, scheduler_output)
        planning.cap(self, scheduler_output)
        return result

    return _update_after_schedule


def _make_feedback(original: Any) -> Any:
    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        planning = _plannings.get(self.vllm_config.instance_id)
        if planning is not None:
            planning.learn(self, scheduler_output, model_runner_output)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output
