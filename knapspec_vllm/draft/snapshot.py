# SPDX-License-Identifier: Apache-2.0
"""What a proposer did so far and what it does now, as JSON-ready numbers for people and metrics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from knapspec_vllm.planner.types import Choice, Mode

if TYPE_CHECKING:
    from knapspec_vllm.draft.proposer import KnapSpecProposer


def snapshot(proposer: KnapSpecProposer) -> dict[str, Any]:
    """Counters, the last decision and, of the last plan that drafted, what is known of it.

    Reads plain numbers on the host: safe from another thread, never waits for the device.
    """
    state: dict[str, Any] = {
        "stats": proposer.stats.as_dict(),
        "settings": proposer.config.to_mapping(),
        "calibration": dict(proposer.calibration),
        "memory_bytes": dict(proposer.memory_bytes),
    }
    graphs = None if proposer.engine is None else proposer.drafter.graphs
    if graphs is not None or len(proposer.verify_graphs):
        taken = 0 if graphs is None else graphs.memory_bytes
        state["memory_bytes"]["graph"] = taken + proposer.verify_graphs.memory_bytes
    if proposer.screen is not None:
        state["memory_bytes"]["head"] = proposer.screen.bytes
    planning = proposer.planning
    if planning is None:
        return state
    last = planning.last_choice
    state |= {"decision": last.reason, "drafting": last.plan is not None}
    state |= _of_plan(planning.last_drafting_choice)
    assert proposer.engine is not None
    state["layers"] = proposer.engine.view.num_layers
    state["tp_plan_mismatches"] = proposer.agreement.mismatches
    plan = planning.last_drafting_choice.plan
    if plan is not None:
        context = planning.drafting_context
        state["believed_acceptance"] = planning.acceptance.alpha(plan, context)
    return state


def _of_plan(choice: Choice) -> dict[str, Any]:
    plan = choice.plan
    speedup = choice.predicted_speedup
    attention, mlp = ([], []) if plan is None else (plan.modes[::2], plan.modes[1::2])
    return {
        "plan": None if plan is None else plan.describe(),
        "plan_text": None if plan is None else plan.to_text(),
        "skipped": {
            "attention": sum(mode == Mode.SKIP for mode in attention),
            "mlp": sum(mode == Mode.SKIP for mode in mlp),
        },
        "windowed": sum(mode == Mode.WINDOW for mode in attention),
        "draft_length": choice.draft_length,
        "predicted_speedup": None if math.isnan(speedup) else speedup,
    }
