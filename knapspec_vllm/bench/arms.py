# SPDX-License-Identifier: Apache-2.0
"""Arms of a benchmark: names for the `speculative_config` of an engine; `plain` is the baseline."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PLAIN = "plain"
#: Names of published planners that the `strategy` setting knows.
PUBLISHED = ("self_sd", "swift", "clasp", "del")

#: KnapSpec's settings of the arms that use it.
KNAPSPEC_ARMS: dict[str, dict[str, Any]] = {
    "knapspec": {},
    "paper": {"objective": "paper", "windows": False},
    # Selected but never drafts, by its own judgement: what declining costs.
    "declining": {"min_speedup": 1e9},
    # A published planner has no rule for declining.
    **{name: {"strategy": name, "always_draft": True} for name in PUBLISHED},
}
#: vLLM's own methods that need no second model.
VLLM_ARMS: dict[str, dict[str, Any]] = {
    # The values of vLLM's documentation.
    "ngram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
    # Answers of earlier rounds are not kept: greedy ones come again word for word.
    "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 0},
}
NAMES = (PLAIN, *VLLM_ARMS, *KNAPSPEC_ARMS)
DEFAULT = (PLAIN, "ngram", "suffix", "knapspec")
SUFFIX_PACKAGE = "arctic_inference"


class UsageError(ValueError):
    """Wrong arguments; the message names the option."""


@dataclass(frozen=True)
class Arm:
    """One engine of the comparison. speculative: vLLM's `speculative_config`, None for plain.

    engine_args (of vllm.LLM) and environment are of this arm alone.
    """

    name: str
    speculative: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)

    @property
    def is_knapspec(self) -> bool:
        return self.speculative is not None and self.speculative.get("method") == "knapspec"

    def described(self) -> dict[str, Any]:
        """What the results say of it before it has run."""
        own = {"environment": self.environment, "engine_args": self.engine_args}
        return {"speculative_config": self.speculative, **{k: v for k, v in own.items() if v}}


def make_arms(
    names: Sequence[str],
    own: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    num_speculative_tokens: int = 8,
) -> tuple[list[Arm], dict[str, str]]:
    """(arms, plain first; arms left out with the reason).

    own: NAME=JSON, where JSON is a speculative_config, or KnapSpec settings if it has no "method",
    or null for one more plain engine, as is "method": null; beside them "engine_args" and
    "environment" of this arm. settings: KnapSpec settings of all arms that use it.
    """
    base = {"method": "knapspec", "num_speculative_tokens": num_speculative_tokens}
    base.update(settings or {})
    arms = {PLAIN: Arm(PLAIN)}
    left_out = {}
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--arms {name}: known arms are {', '.join(NAMES)}; --arm makes one")
        if name == "suffix" and importlib.util.find_spec(SUFFIX_PACKAGE) is None:
            left_out[name] = "needs a package: pip install arctic-inference"
        elif name in VLLM_ARMS:
            arms[name] = Arm(name, VLLM_ARMS[name])
        elif name in KNAPSPEC_ARMS:
            arms[name] = Arm(name, {**base, **KNAPSPEC_ARMS[name]})
    for text in own:
        arm = _own_arm(text, base)
        if arm.name in NAMES or arm.name in arms:
            raise UsageError(f"--arm {arm.name}: the name is taken")
        arms[arm.name] = arm
    if len(arms) == 1:
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise UsageError(f"--arms: nothing to compare with plain. {reasons}".rstrip(". "))
    return list(arms.values()), left_out


def _own_arm(text: str, base: dict[str, Any]) -> Arm:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"--arm {text}: write NAME=JSON, for example wide='{{\"bins\": 64}}'")
    try:
        config = json.loads(value)
    except json.JSONDecodeError as error:
        raise UsageError(f"--arm {name}: not JSON ({error}): {value}") from None
    if config is None:
        return Arm(name)
    if not isinstance(config, dict):
        raise UsageError(f"--arm {name}: a JSON object or null is needed, not {value}")
    own = {key: _object(name, key, config.pop(key, {})) for key in ("environment", "engine_args")}
    if "method" not in config:
        return Arm(name, {**base, **config}, **own)
    if config["method"] is None and len(config) > 1:
        raise UsageError(f'--arm {name}: a plain engine ("method": null) has no further settings')
    return Arm(name, config if config["method"] else None, **own)


def _object(arm: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"--arm {arm}: {key} is a JSON object, not {value!r}")
    return {k: str(v) for k, v in value.items()} if key == "environment" else value
