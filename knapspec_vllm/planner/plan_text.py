# SPDX-License-Identifier: Apache-2.0
"""Plan text: how people write and read plans.

    plan   = "full" | group (";" group)*
    group  = ("skip" | "window") target+        e.g.  skip attn:3,7-9 mlp:5
    target = ("attn" | "mlp") ":" ("*" | span ("," span)*)
    span   = layer | first "-" last             both ends included

Items not named run in full. Naming an item twice is an error, not a silent override.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from knapspec_vllm.planner.types import Mode

_VERBS = {"skip": Mode.SKIP, "window": Mode.WINDOW}
_TARGETS = {"attn": 0, "mlp": 1}
_HINT = "write for example 'skip attn:3,7-9 mlp:5; window attn:10-12' or 'full'"


def parse_modes(text: str, num_layers: int) -> tuple[Mode, ...]:
    """Modes of the 2 * num_layers items. Raises ValueError naming the offending part."""
    modes = [Mode.FULL] * (2 * num_layers)
    cleaned = text.strip().lower()
    if cleaned == "full":
        return tuple(modes)
    if not cleaned:
        raise ValueError(f"empty plan text; {_HINT}")
    for group in cleaned.split(";"):
        words = group.split()
        if not words or words[0] not in _VERBS or len(words) < 2:
            raise ValueError(f"plan text {text!r}: cannot read group {group.strip()!r}; {_HINT}")
        mode = _VERBS[words[0]]
        for target in words[1:]:
            name, _, spans = target.partition(":")
            if name not in _TARGETS or not spans:
                raise ValueError(f"plan text {text!r}: cannot read {target!r}; {_HINT}")
            if name == "mlp" and mode is Mode.WINDOW:
                raise ValueError(f"plan text {text!r}: an MLP has no window, it can be skipped")
            for layer in _layers(spans, num_layers, text):
                item = 2 * layer + _TARGETS[name]
                if modes[item] is not Mode.FULL:
                    raise ValueError(f"plan text {text!r}: {name} {layer} is named twice")
                modes[item] = mode
    return tuple(modes)


def format_modes(modes: Sequence[Mode]) -> str:
    """Plan text of the modes; parse_modes reads it back."""
    num_layers = len(modes) // 2
    groups = []
    for verb, mode in _VERBS.items():
        targets = []
        for name, offset in _TARGETS.items():
            layers = [i for i in range(num_layers) if modes[2 * i + offset] == mode]
            if layers:
                spans = "*" if len(layers) == num_layers else _spans(layers)
                targets.append(f"{name}:{spans}")
        if targets:
            groups.append(" ".join([verb, *targets]))
    return "; ".join(groups) or "full"


def _layers(spans: str, num_layers: int, text: str) -> Iterable[int]:
    if spans == "*":
        return range(num_layers)
    layers: list[int] = []
    for span in spans.split(","):
        first, dash, last = span.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise ValueError(f"plan text {text!r}: cannot read layers {span!r}; {_HINT}")
        low, high = int(first), int(last or first)
        if low > high or high >= num_layers:
            raise ValueError(
                f"plan text {text!r}: layers {span!r} must ascend and lie in 0..{num_layers - 1}"
            )
        layers.extend(range(low, high + 1))
    return layers


def _spans(layers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in spans)
