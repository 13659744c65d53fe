# SPDX-License-Identifier: Apache-2.0
"""Settings of KnapSpec: one frozen dataclass, read from ``additional_config["knapspec"]``.

Nothing here imports vLLM or torch: the API process, every worker, the tests and the command line
all read the same class.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: Key under which the settings travel inside ``VllmConfig.additional_config``.
ADDITIONAL_CONFIG_KEY = "knapspec"
MAX_SPECULATIVE_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class KnapSpecConfig:
    """Every setting has a default; a server needs none of them."""

    objective: Literal["throughput", "paper"] = "throughput"
    """What a plan is chosen for. ``throughput``: tokens per time of the whole batch with every
    measured cost. ``paper``: the published single-request objective, for comparison."""

    strategy: Literal["knapspec", "self_sd", "swift", "clasp", "del"] = "knapspec"
    """Who finds the plans to choose from. ``knapspec``: the solver. The others are the planners of
    published methods, there to be compared with; see ``knapspec bench``."""

    plan: str = "auto"
    """``auto`` lets the planner choose; any other text is a plan such as
    ``"skip attn:3,7-9 mlp:5; window attn:*"`` and forces it."""

    draft_length: int | None = None
    """Force this many drafted tokens per round (0 to num_speculative_tokens; with 0 nothing is
    measured at start either). None: the planner chooses every round."""

    always_draft: bool = False
    """Never decline to speculate, even when it is predicted to lose. For demos and tests."""

    windows: bool = True
    """Allow plans in which attention layers read only a window of the context."""

    window_tokens: int = 512
    """Most recent tokens a WINDOW layer reads."""

    sink_tokens: int = 64
    """First tokens of the context a WINDOW layer reads in addition."""

    draft_attention: Literal["auto", "backend", "kernel"] = "auto"
    """Who computes attention in draft forwards: vLLM's attention ``backend`` or KnapSpec's own
    ``kernel``. ``auto``: the one that calibration measured to be faster; on a CPU the backend."""

    draft_head: Literal["auto", "full", "screened"] = "auto"
    """How the draft's most likely token is found: by the model's ``full`` head, or ``screened``, by
    a copy of it in 8-bit integers and the head's own weights for the likeliest few. ``auto``: on a
    CPU the one that calibration measured to be faster, else ``full``."""

    draft_graphs: int = 32
    """Most draft steps kept as CUDA graphs, one for each plan and padded batch. 0: none. They need
    KnapSpec's own attention kernel, one rank and a server without ``--enforce-eager``."""

    keep_first_layers: int = 1
    """Leading layers whose attention and MLP always run in full."""

    keep_last_layers: int = 1
    """Trailing layers whose attention and MLP always run in full."""

    confidence_threshold: float = 0.0
    """A row stops drafting after a token whose top-1 probability is below this. 0 disables it,
    because it costs more than it saves when plans are accurate: 0.6 gave 1.78x where 0 gave 1.89x
    (block-expanded SmolLM2, batch 1, 2-core CPU)."""

    reference_tokens: int = 8
    """Committed tokens per row the solver judges plans on; more where the batch has fewer than
    reference_rows rows, so that their product stays."""

    reference_rows: int = 2
    """Rows of the batch the solver takes reference tokens from."""

    bins: int = 32
    """Cost levels of the frontier: the solver keeps the best plan of each."""

    live_branches: int = 32
    """Most partial plans the solver runs at once. Bounds its memory and time."""

    max_saving: float = 0.75
    """Largest share of the item time a plan may save (above 0, at most 1)."""

    prune_cosine: float = 0.85
    """The solver drops a partial plan whose hidden states fall below this cosine. Below 0.85 the
    draft agrees with the target on a third of the tokens or fewer (SmolLM2), which never pays."""

    prior_weight: float = 16.0
    """Strength of what the distance of a plan's last states to the target's says of its acceptance,
    in tokens."""

    feedback_half_life: float = 256.0
    """Drafted tokens of later rounds after which an acceptance observation counts half."""

    min_speedup: float = 1.1
    """Start speculating only above this predicted speedup (1.0 or more), and stop half-way between
    it and 1. Predictions are optimistic: 1.06x became 0.91x (SmolLM2, chat, 2-core CPU)."""

    hysteresis: float = 0.03
    """Keep the current plan and draft length unless another is better by this share."""

    resolve: bool = True
    """Allow the solver to run while serving. False: use the stored or forced frontier only."""

    resolve_rounds: int = 2048
    """Rounds after which a frontier counts as old."""

    resolve_drift: float = 0.15
    """Re-solve when observed acceptance differs from its estimate by more than this."""

    resolve_cost_ratio: float = 2.0
    """Re-solve when the batch's costs differ from the solved ones by more than this factor."""

    calibration: Literal["auto", "force", "off"] = "auto"
    """``auto``: measure cost curves at start unless the store has them. ``force``: always
    measure. ``off``: never measure; stored curves only, and without them nothing is drafted."""

    calibration_seconds: float = 15.0
    """About how long calibration may take at start, in seconds."""

    store_dir: str | None = None
    """Folder of the calibration store. None: beside vLLM's own cache."""

    round_overhead_us: float | None = None
    """What a speculative round costs on top of the model's steps, in microseconds; what rounds take
    is not learned then (acceptance is). None: learned online."""

    debug_invariants: bool = False
    """Check after every round that drafting wrote only into K/V slots that verification rewrites.
    Slow; for tests and bug reports."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Every known setting, in declaration order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> KnapSpecConfig:
        """Build from user input.

        Raises ValueError for an unknown key (naming the nearest known one) or a value of the
        wrong type or range (naming the setting and what to write).
        """
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"knapspec settings must be a mapping of names to values, got {settings!r}; "
                'write --additional-config \'{"knapspec": {"window_tokens": 512}}\'.'
            )
        for key in settings:
            if key not in cls.field_names():
                raise ValueError(unknown_key_message(str(key), cls.field_names()))
        return cls(**settings)

    def to_mapping(self) -> dict[str, Any]:
        """Only what differs from the defaults, in declaration order."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def refuses(self, num_speculative_tokens: int) -> str | None:
        """Why a round may not draft up to so many tokens, and what to write; None: it may."""
        if not 1 <= num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            return (
                f"num_speculative_tokens is {num_speculative_tokens}; write 1 to "
                f"{MAX_SPECULATIVE_TOKENS}."
            )
        if self.draft_length is not None and self.draft_length > num_speculative_tokens:
            return (
                f"draft_length is {self.draft_length}, more than num_speculative_tokens, which is "
                f"{num_speculative_tokens}; raise num_speculative_tokens or lower draft_length."
            )
        return None

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> KnapSpecConfig:
        """Read ``vllm_config.additional_config["knapspec"]``; absent means all defaults."""
        additional = getattr(vllm_config, "additional_config", None)
        if not isinstance(additional, Mapping):
            return cls()
        return cls.from_mapping(additional.get(ADDITIONAL_CONFIG_KEY) or {})


def unknown_key_message(key: str, known: tuple[str, ...]) -> str:
    """One sentence that names the nearest known setting, or all of them when none is near."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known settings are: {', '.join(known)}."
    return f"unknown knapspec setting '{key}'; {hint}"


#: name -> (lowest, highest, lowest itself allowed). Highest is always allowed.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "draft_length": (0, MAX_SPECULATIVE_TOKENS, True),
    "window_tokens": (1, 1 << 24, True),
    "sink_tokens": (0, 1 << 24, True),
    "draft_graphs": (0, 1024, True),
    "keep_first_layers": (0, 1 << 16, True),
    "keep_last_layers": (0, 1 << 16, True),
    "confidence_threshold": (0.0, 1.0, True),
    "reference_tokens": (1, 1024, True),
    "reference_rows": (1, 256, True),
    "bins": (2, 1024, True),
    "live_branches": (1, 1024, True),
    "max_saving": (0.0, 1.0, False),
    "prune_cosine": (-1.0, 1.0, True),
    "prior_weight": (0.0, math.inf, False),
    "feedback_half_life": (0.0, math.inf, False),
    "min_speedup": (1.0, math.inf, True),
    "hysteresis": (0.0, 1.0, True),
    "resolve_rounds": (1, 1 << 62, True),
    "resolve_drift": (0.0, 1.0, False),
    "resolve_cost_ratio": (1.0, math.inf, False),
    "calibration_seconds": (0.0, math.inf, False),
    "round_overhead_us": (0.0, math.inf, True),
}


def _checked(name: str, value: Any) -> Any:
    """The value in its declared type, or ValueError saying what to write instead."""
    hint = typing.get_type_hints(KnapSpecConfig)[name]
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    if choices:
        if value not in choices:
            wanted = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"knapspec setting '{name}' is {value!r}; write {wanted}.")
        return value
    kinds = typing.get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    value = _converted(name, value, kind, nullable=type(None) in kinds)
    if kind is str and not value.strip():
        raise ValueError(f"knapspec setting '{name}' is empty; leave it out for its default.")
    if name in _RANGES:
        _check_range(name, value)
    return value


def _converted(name: str, value: Any, kind: type, *, nullable: bool) -> Any:
    """`value` as `kind`: only a whole number written as an int may stand for a float."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    exact = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not exact or (kind is float and not math.isfinite(value)):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        wanted = words[kind] + (" or null" if nullable else "")
        raise ValueError(f"knapspec setting '{name}' is {value!r}; write {wanted}.")
    return value


def _check_range(name: str, value: float) -> None:
    low, high, low_allowed = _RANGES[name]
    if value > high or value < low or (value == low and not low_allowed):
        at_least = f"{low:g} or more" if low_allowed else f"more than {low:g}"
        at_most = f", at most {high:g}" if high < 1 << 24 else ""
        raise ValueError(
            f"knapspec setting '{name}' is {value!r}; write a number of {at_least}{at_most}."
        )


def leaves_no_choice(plan: str, draft_length: int | None) -> bool:
    """Whether these two settings say all there is to draft, so that nothing needs a price."""
    return draft_length == 0 or (plan != "auto" and draft_length is not None)
