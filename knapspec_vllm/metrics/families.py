# SPDX-License-Identifier: Apache-2.0
"""Every `knapspec:` metric: name, type, help, labels, and where its values come from.

The values are those of `draft.snapshot`, as published by a worker. Each family answers one of the
questions: is it on, is it helping, why not, what was chosen, is the model right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from knapspec_vllm.metrics.stats import BATCH_BOUNDS, RATIO_BOUNDS, SOLVE_BOUNDS

PREFIX = "knapspec:"
ENGINE_LABELS = ("model_name", "engine")
"""Of every metric, before its own."""
State = Mapping[str, Any]
Sample = tuple[tuple[str, ...], Any]
"""Label values, and a number; of a histogram {"counts", "sum"}."""


@dataclass(frozen=True)
class Family:
    """One metric. read: its samples from a worker's state; none while there is nothing to say."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[State], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def exposed(self) -> tuple[str, ...]:
        """Names that /metrics shows."""
        name = PREFIX + self.name
        if self.kind == "counter":
            return (f"{name}_total",)
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_count", f"{name}_sum")
        return (name,)


def _stat(name: str) -> Callable[[State], Iterable[Sample]]:
    return lambda state: [((), state["stats"][name])]


def _by(name: str) -> Callable[[State], Iterable[Sample]]:
    """Of a stat that is a mapping: one sample per key."""
    return lambda state: [((key,), value) for key, value in state["stats"][name].items()]


def _value(*path: str) -> Callable[[State], Iterable[Sample]]:
    def read(state: State) -> Iterable[Sample]:
        value: Any = state
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return [] if value is None else [((), float(value))]

    return read


def _mapping(name: str) -> Callable[[State], Iterable[Sample]]:
    return lambda state: [((key,), value) for key, value in (state.get(name) or {}).items()]


def _by_position(name: str) -> Callable[[State], Iterable[Sample]]:
    return lambda state: [((str(i),), n) for i, n in enumerate(state["stats"][name])]


def _phases(state: State) -> Iterable[Sample]:
    spent = state["stats"]["phase_us"]
    names = {"draft": "draft", "step": "verify", "own": "overhead"}
    found = [((phase,), spent[name] / 1e6) for name, phase in names.items()]
    return [*found, (("plan",), state["stats"]["measured_solve_us"] / 1e6)]


def _rounds_us(state: State) -> Iterable[Sample]:
    return [
        ((who, what), state["stats"][f"{stat}_{what}_us"] / 1e6)
        for who, stat in (("predicted", "predicted"), ("observed", "realised"))
        for what in ("round", "plain")
    ]


def _graphs(state: State) -> Iterable[Sample]:
    results = ("hit", "miss", "captured", "evicted", "failed")
    return [((result,), state["stats"]["graphs"].get(result, 0)) for result in results]


def _verify_steps(state: State) -> Iterable[Sample]:
    return [((kind,), state["stats"]["verify_steps"].get(kind, 0)) for kind in ("whole", "pieces")]


def _changes(state: State) -> Iterable[Sample]:
    changes = state["stats"]["plan_changes"]
    return [((reason,), changes.get(reason, 0)) for reason in ("start", "stop", "plan")]


def _batches(state: State) -> Iterable[Sample]:
    stats = state["stats"]
    return [(("true",), stats["drafting_rows"]), (("false",), stats["declining_rows"])]


def _calibration(state: State) -> Iterable[Sample]:
    facts = state.get("calibration") or {}
    names = ("hardware", "source", "attention", "head")
    return [(tuple(str(facts[name]) for name in names), 1)] if facts else []


def _age(state: State) -> Iterable[Sample]:
    measured = (state.get("calibration") or {}).get("measured_at")
    return [] if measured is None else [((), max(0.0, time.time() - measured))]


FAMILIES: tuple[Family, ...] = (
    Family("enabled", "gauge", "1 while the last decision was to draft, 0 while it was to decline.",
           _value("drafting")),
    Family("rounds", "counter", "Rounds with at least one decoding request.", _stat("rounds")),
    Family("drafting_rounds", "counter", "Rounds that drafted.", _stat("drafting_rounds")),
    Family("skipped_steps", "counter", "Rounds that did not draft, by reason.",
           _by("declined_rounds"), ("reason",)),
    Family("estimated_speedup_ratio", "gauge",
           "Over plain steps of this engine, last minute: what they would have taken for the "
           "tokens gained, over what rounds took. Declined rounds count as 1. What an engine loses "
           "by selecting KnapSpec (its own work, asynchronous scheduling, V2 runner) is not in it.",
           _value("recent_speedup")),
    Family("round_seconds", "counter",
           "Of measured rounds: time of the rounds and of plain decoding for their tokens, as "
           "predicted and as observed. plain over round is a speedup.",
           _rounds_us, ("source", "what")),
    Family("phase_seconds", "counter",
           "Time of measured rounds by phase: draft forwards, verify steps, solving for plans, "
           "other work of KnapSpec.", _phases, ("phase",)),
    Family("plan_skipped_blocks", "gauge", "Sublayers that the current plan skips, by kind.",
           _mapping("skipped"), ("kind",)),
    Family("plan_window_blocks", "gauge", "Attentions of the current plan that read a window.",
           _value("windowed")),
    Family("plan_layers", "gauge", "Layers of the model.", _value("layers")),
    Family("plan_draft_length", "gauge", "Tokens a round of the current plan drafts at most.",
           _value("draft_length")),
    Family("plan_predicted_speedup_ratio", "gauge", "What the current plan was chosen for.",
           _value("predicted_speedup")),
    Family("plan_believed_acceptance", "gauge",
           "Acceptance of a drafted token that the planner expects of the current plan.",
           _value("believed_acceptance")),
    Family("plan_changes", "counter",
           "Changes of the plan, by reason: another one (plan), or drafting began or ended (start, "
           "stop).", _changes, ("reason",)),
    Family("tp_plan_mismatch", "counter",
           "Decisions for which a tensor-parallel rank had seen another batch or drafted another "
           "plan than rank 0, added up over ranks every 32 of their broadcasts. Should stay 0; if "
           "ranks wait for each other it is no longer counted, and the first one's log has it.",
           _value("tp_plan_mismatches")),
    Family("plan_solve_seconds", "histogram", "Time of a solve for plans.",
           lambda state: [((), state["stats"]["solve_seconds"])], bounds=SOLVE_BOUNDS),
    Family("predicted_vs_observed_ratio", "histogram",
           "Observed over predicted time of a round.",
           lambda state: [(("round",), state["stats"]["round_ratio"])], ("quantity",),
           RATIO_BOUNDS),
    Family("draft_tokens", "counter", "Drafted tokens that were verified, by context length.",
           _by("drafted_by_context"), ("context",)),
    Family("accepted_tokens", "counter", "Drafted tokens that were accepted, by context length.",
           _by("accepted_by_context"), ("context",)),
    Family("draft_tokens_per_pos", "counter", "Drafted tokens that were verified, by position.",
           _by_position("drafted_by_position"), ("position",)),
    Family("accepted_tokens_per_pos", "counter", "Drafted tokens that were accepted, by position.",
           _by_position("accepted_by_position"), ("position",)),
    Family("placeholder_tokens", "counter",
           "Placeholders of vLLM's own among what it counts as drafted.",
           _stat("placeholder_tokens")),
    Family("clipped_rows", "counter",
           "Rows that could not draft or keep the maximum, by reason; of rounds looked at.",
           _by("clipped_rows"), ("reason",)),
    Family("batch_size", "histogram", "Decoding requests of a round.", _batches, ("drafting",),
           BATCH_BOUNDS),
    Family("cudagraph", "counter",
           "Draft rounds that replayed a captured step (hit) or had none yet (miss); captures that "
           "were made (captured), dropped for a newer one (evicted) or could not be made (failed).",
           _graphs, ("result",)),
    Family("verify_steps", "counter",
           "Steps that verified drafts by one graph of the whole step (whole) or not (pieces); 0 "
           "where no whole steps were captured.", _verify_steps, ("graph",)),
    Family("memory_bytes", "gauge",
           "Memory beyond plain vLLM's, at most, by kind. lookahead is part of the KV cache.",
           _mapping("memory_bytes"), ("kind",)),
    Family("calibration_info", "gauge",
           "Where the cost curves come from, and with which attention and head drafts run.",
           _calibration, ("hardware", "source", "attention", "head")),
    Family("calibration_age_seconds", "gauge", "Time since the cost curves were measured.", _age),
)  # fmt: skip
