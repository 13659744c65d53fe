# SPDX-License-Identifier: Apache-2.0
"""Functions that run inside vLLM's workers (`LLM.collective_rpc`) and answer with JSON text.

A module of their own: a worker process imports it by name, whatever started the engine.
"""

from __future__ import annotations

import json
from typing import Any


def _of_drafter(worker: Any, name: str) -> Any:
    """An attribute of the runner's proposer; None where it is not KnapSpec's, or there is none."""
    drafter = getattr(getattr(worker, "model_runner", None), "drafter", None)
    return getattr(drafter, name, None)


def knapspec_snapshot(worker: Any) -> str:
    """The proposer's state and counters; null where KnapSpec is not selected."""
    snapshot = _of_drafter(worker, "snapshot")
    return json.dumps(snapshot() if callable(snapshot) else None)


def knapspec_stood_still(worker: Any) -> None:
    """Tell KnapSpec, where it is selected, that the engine did not run for a while."""
    stood_still = _of_drafter(worker, "stood_still")
    if callable(stood_still):
        stood_still()


def worker_facts(worker: Any) -> str:
    """What a worker computes on."""
    import torch

    from knapspec_vllm.hardware import cpu_name

    device = getattr(worker, "device", None)
    on_gpu = getattr(device, "type", "cpu") == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "runner": type(getattr(worker, "model_runner", None)).__module__,
    }
    return json.dumps(facts)


def worker_memory(worker: Any) -> str:
    """Bytes that this process holds: resident on a CPU, reserved by torch on a GPU."""
    import psutil
    import torch

    device = getattr(worker, "device", None)
    if getattr(device, "type", "cpu") == "cuda":
        return json.dumps(torch.cuda.memory_reserved(device))
    return json.dumps(psutil.Process().memory_info().rss)


def knapspec_costs(worker: Any) -> str:
    """Cost curves, the frontier and where they are stored, as JSON; null without a planner."""
    drafter = worker.model_runner.drafter
    policy = drafter.planning.policy
    if policy is None:
        return json.dumps(None)
    frontier = policy.frontier
    return json.dumps(
        {
            "costs": policy.costs.to_json(),
            "frontier": None if frontier is None else frontier.to_json(),
            "calibration": drafter.calibration,
        }
    )


def request_solve(worker: Any) -> None:
    """Make the next round with a long enough request solve for plans."""
    worker.model_runner.drafter.planning.request_solve()
