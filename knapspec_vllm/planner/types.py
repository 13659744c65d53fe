# SPDX-License-Identifier: Apache-2.0
"""Immutable vocabulary of the planner: plans, their estimates, batches and choices.

A model of L layers has 2L items: item 2i is layer i's attention, item 2i + 1 its MLP. A plan gives
every item a mode. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any, Literal

ItemKind = Literal["attention", "mlp"]
FrontierSource = Literal["solved", "stored", "forced"]
_SOURCES = ("solved", "stored", "forced")


class Mode(IntEnum):
    """How the draft runs an item. MLPs know FULL and SKIP only."""

    FULL = 0
    WINDOW = 1
    SKIP = 2


@dataclass(frozen=True)
class Plan:
    """A mode for each of the 2L items."""

    modes: tuple[Mode, ...]

    def __post_init__(self) -> None:
        if not self.modes or len(self.modes) % 2:
            raise ValueError(f"a plan needs two modes per layer, got {len(self.modes)} modes")
        object.__setattr__(self, "modes", tuple(Mode(mode) for mode in self.modes))
        if Mode.WINDOW in self.modes[1::2]:
            layer = self.modes[1::2].index(Mode.WINDOW)
            raise ValueError(f"the MLP of layer {layer} has mode WINDOW; an MLP is FULL or SKIP")

    def __hash__(self) -> int:
        # Plans key per-round dicts; hashing up to 200 modes each time would cost microseconds.
        return int(self.key, 16)

    def __reduce__(self) -> tuple[Any, ...]:
        # To other processes with every step: a byte an item, and one object for all of a plan.
        return _plan_of, (bytes(self.modes),)

    @classmethod
    def full(cls, num_layers: int) -> Plan:
        """The plan that runs everything."""
        return cls((Mode.FULL,) * (2 * num_layers))

    @classmethod
    def parse(cls, text: str, num_layers: int) -> Plan:
        """Reads plan text such as ``skip attn:3,7-9 mlp:5; window attn:*``; see plan_text."""
        from knapspec_vllm.planner.plan_text import parse_modes

        return cls(parse_modes(text, num_layers))

    def to_text(self) -> str:
        """Shortest plan text that parses back to this plan."""
        from knapspec_vllm.planner.plan_text import format_modes

        return format_modes(self.modes)

    def describe(self) -> str:
        """The plan in plain words, for logs."""
        if self.is_full:
            return f"runs all {self.num_layers} layers"
        parts = []
        if skipped := self.count("attention", Mode.SKIP):
            parts.append(f"skips {skipped} of {self.num_layers} attentions")
        if windowed := self.count("attention", Mode.WINDOW):
            parts.append(f"windows {windowed} of {self.num_layers} attentions")
        if skipped := self.count("mlp", Mode.SKIP):
            parts.append(f"skips {skipped} of {self.num_layers} MLPs")
        return ", ".join(parts)

    @property
    def num_layers(self) -> int:
        return len(self.modes) // 2

    def attention(self, layer: int) -> Mode:
        return self.modes[2 * layer]

    def mlp(self, layer: int) -> Mode:
        return self.modes[2 * layer + 1]

    def count(self, kind: ItemKind, mode: Mode) -> int:
        """Number of items of a kind that run in a mode."""
        return self._counts[kind][mode]

    @cached_property
    def _counts(self) -> dict[str, tuple[int, int, int]]:
        def tally(modes: tuple[Mode, ...]) -> tuple[int, int, int]:
            return modes.count(Mode.FULL), modes.count(Mode.WINDOW), modes.count(Mode.SKIP)

        return {"attention": tally(self.modes[0::2]), "mlp": tally(self.modes[1::2])}

    @cached_property
    def key(self) -> str:
        """8 hex digits, the same in every process: metric label and graph key."""
        return hashlib.blake2s(bytes(self.modes), digest_size=4).hexdigest()

    @property
    def is_full(self) -> bool:
        return self._counts["attention"][0] + self._counts["mlp"][0] == len(self.modes)


@lru_cache(maxsize=256)
def _plan_of(modes: bytes) -> Plan:
    return Plan(tuple(map(Mode, modes)))


@dataclass(frozen=True)
class PlanEstimate:
    """What the solver measured about a plan on its reference tokens."""

    plan: Plan
    cosine: float
    """Cosine between draft and target residual streams after the last item, mean over tokens."""
    hits: int
    """Reference tokens on which draft and target have the same top-1 token."""
    trials: int
    """Reference tokens compared; 0 for a plan nobody measured."""

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.trials:
            raise ValueError(f"hits must lie in 0..trials, got {self.hits} of {self.trials}")
        if not -1.001 <= self.cosine <= 1.001:
            raise ValueError(f"cosine must lie in -1..1, got {self.cosine}")


@dataclass(frozen=True)
class Batch:
    """The decode batch a decision is for."""

    rows: int
    context_tokens: int
    """Sum of the rows' context lengths."""
    room: tuple[float, ...] = ()
    """Shares of the rows that may draft at least 1, 2, ... tokens; none beyond its end. Empty: all
    rows as many as are wanted. Rows with less room wait for the others' drafts and gain nothing;
    where a graph of the whole verify step wants it they draft along, which is not reckoned with."""

    @property
    def context_per_row(self) -> float:
        return self.context_tokens / self.rows

    def __post_init__(self) -> None:
        if self.rows < 1 or self.context_tokens < 0:
            raise ValueError(
                f"a batch has rows >= 1 and context_tokens >= 0, got {self.rows} and "
                f"{self.context_tokens}"
            )


@dataclass(frozen=True)
class Frontier:
    """The solver's output: plans worth choosing from, and the batch they were solved for."""

    estimates: tuple[PlanEstimate, ...]
    context_tokens: int
    rows: int
    source: FrontierSource

    def __post_init__(self) -> None:
        if self.source not in _SOURCES:
            raise ValueError(f"frontier source must be one of {_SOURCES}, got {self.source!r}")
        if self.rows < 1 or self.context_tokens < 0:
            raise ValueError(
                f"a frontier has rows >= 1 and context_tokens >= 0, got {self.rows} and "
                f"{self.context_tokens}"
            )
        if len({estimate.plan.num_layers for estimate in self.estimates}) > 1:
            raise ValueError("the plans of a frontier must have the same number of layers")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; plans as plan text."""
        layers = self.estimates[0].plan.num_layers if self.estimates else 0
        return {
            "num_layers": layers,
            "context_tokens": self.context_tokens,
            "rows": self.rows,
            "source": self.source,
            "estimates": [
                {"plan": e.plan.to_text(), "cosine": e.cosine, "hits": e.hits, "trials": e.trials}
                for e in self.estimates
            ],
        }

    @classmethod
    def from_json(cls, obj: Any) -> Frontier:
        """Inverse of to_json. Raises ValueError on anything to_json would not have written."""
        try:
            layers = _integer(obj, "num_layers")
            entries = obj["estimates"]
            if not isinstance(entries, Sequence) or isinstance(entries, str):
                raise ValueError("estimates is not a list")
            estimates = tuple(
                PlanEstimate(
                    plan=Plan.parse(str(entry["plan"]), layers),
                    cosine=float(entry["cosine"]),
                    hits=_integer(entry, "hits"),
                    trials=_integer(entry, "trials"),
                )
                for entry in entries
            )
            return cls(
                estimates=estimates,
                context_tokens=_integer(obj, "context_tokens"),
                rows=_integer(obj, "rows"),
                source=obj["source"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a stored frontier: {error}") from error


@dataclass(frozen=True)
class Choice:
    """What to do this round."""

    plan: Plan | None
    draft_length: int
    predicted_speedup: float
    """Of this choice over plain decoding; 1.0 when it does not speculate."""
    reason: str
    """For people: numbers and all."""
    code: str = ""
    """For counters, few values: why nothing is drafted; empty when something is."""
    round_us: float = 0.0
    """Predicted time of the round; 0 when there are no cost curves."""

    def __post_init__(self) -> None:
        if (self.plan is None) != (self.draft_length == 0) or self.draft_length < 0:
            raise ValueError("a choice has a plan exactly when draft_length > 0")


def _integer(obj: Mapping[str, Any], name: str) -> int:
    value = obj[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return value
