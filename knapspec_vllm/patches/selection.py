# SPDX-License-Identifier: Apache-2.0
"""Whether a config selects KnapSpec, and how the short form becomes vLLM's own form.

Works on plain mappings and duck-typed configs; imports nothing of vLLM.
"""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knapspec_vllm.config import ADDITIONAL_CONFIG_KEY, KnapSpecConfig, unknown_key_message

METHOD = "knapspec"
PROPOSER_PATH = "knapspec_vllm.KnapSpecProposer"
PROPOSER_PATHS = (PROPOSER_PATH, "knapspec_vllm.draft.proposer.KnapSpecProposer")
DEFAULT_NUM_SPECULATIVE_TOKENS = 8

#: SpeculativeConfig keys that mean something with KnapSpec; refusals.py judges their values.
_VLLM_KEYS = ("num_speculative_tokens", "rejection_sample_method", "draft_sample_method")

#: Added by vLLM itself when it builds the config; there again when one EngineArgs builds two.
_INTERNAL_KEYS = ("target_model_config", "target_parallel_config")


class AdditionalConfig(UserDict[str, Any]):
    """vLLM's additional_config with KnapSpec's settings in it, which compile nothing differently.

    vLLM makes a dictionary of that name part of the key of its compilation cache, and asks any
    other object for its hash (`vllm.config.utils.SupportsHash`). As a dictionary it had the target
    compiled again, for minutes, whenever a setting of KnapSpec changed. Code that asks whether it
    is a dict takes it for none: vLLM's does so for models that KnapSpec refuses (gdn, kda).
    """

    def compute_hash(self) -> str:
        """What vLLM makes of the rest."""
        rest = {key: value for key, value in self.data.items() if key != ADDITIONAL_CONFIG_KEY}
        if not rest:
            return "None"
        text = json.dumps(rest, sort_keys=True).encode()
        return hashlib.md5(text, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Rewritten:
    """The two places of vLLM's own configuration the short form is spread over."""

    speculative_config: dict[str, Any]
    additional_config: AdditionalConfig


def is_selected(vllm_config: Any) -> bool:
    """Whether this VllmConfig drafts with KnapSpec."""
    return drafts_with_knapspec(getattr(vllm_config, "speculative_config", None))


def drafts_with_knapspec(speculative: Any) -> bool:
    """Whether this SpeculativeConfig, or None, is KnapSpec's."""
    return (
        speculative is not None
        and getattr(speculative, "method", None) == "custom_class"
        and getattr(speculative, "model", None) in PROPOSER_PATHS
    )


def is_requested(
    speculative: Mapping[str, Any] | None, spec_method: str | None, spec_model: str | None
) -> bool:
    """Whether the user's input (before vLLM validates it) asks for KnapSpec in either form."""
    speculative = speculative or {}
    method = spec_method or speculative.get("method")
    model = spec_model or speculative.get("model")
    return method == METHOD or (method in (None, "custom_class") and model in PROPOSER_PATHS)


def rewrite(
    speculative: Mapping[str, Any],
    additional: Mapping[str, Any] | None,
    vllm_keys: frozenset[str],
) -> Rewritten:
    """Turn what selects KnapSpec, in either form, into vLLM's custom_class form.

    speculative: the user's --speculative-config, keys with underscores. additional: the
    user's --additional-config. vllm_keys: every key this vLLM's SpeculativeConfig knows, to tell a
    meaningless key from a misspelt one. Raises ValueError naming the key.
    """
    given = {key: value for key, value in speculative.items() if key not in _INTERNAL_KEYS}
    given.pop("method", None)
    model = given.pop("model", None)
    if model is not None and model not in PROPOSER_PATHS:
        raise ValueError(
            f"speculative-config names model '{model}', but knapspec drafts with the served "
            'model itself; remove "model".'
        )
    settings = {key: given.pop(key) for key in KnapSpecConfig.field_names() if key in given}
    for key in given:
        if key not in _VLLM_KEYS:
            raise ValueError(_refused_key(key, key in vllm_keys))
    given.setdefault("num_speculative_tokens", DEFAULT_NUM_SPECULATIVE_TOKENS)
    return Rewritten(
        {"method": "custom_class", "model": PROPOSER_PATH, **given},
        AdditionalConfig(merge_settings(additional, settings)),
    )


def merge_settings(
    additional: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """`additional` with `settings` under "knapspec"; ValueError when both set a key differently."""
    if additional is not None and not isinstance(additional, Mapping):
        raise ValueError(
            "knapspec settings travel in --additional-config, which must then be a mapping, "
            f"not {type(additional).__name__}."
        )
    merged = dict(additional or {})
    present = merged.get(ADDITIONAL_CONFIG_KEY) or {}
    if not isinstance(present, Mapping):
        KnapSpecConfig.from_mapping(present)  # raises with the right words
    for key, value in settings.items():
        if key in present and present[key] != value:
            raise ValueError(
                f"knapspec setting '{key}' is {value!r} in --speculative-config and "
                f"{present[key]!r} in --additional-config; set it in one of them."
            )
    combined = KnapSpecConfig.from_mapping({**present, **settings}).to_mapping()
    if combined or ADDITIONAL_CONFIG_KEY in merged:
        merged[ADDITIONAL_CONFIG_KEY] = combined
    return merged


def _refused_key(key: str, vllm_knows_it: bool) -> str:
    if vllm_knows_it:
        return (
            f"speculative-config key '{key}' has no meaning with knapspec, which drafts with the "
            "served model itself and chooses the draft length per batch; remove it."
        )
    return unknown_key_message(key, (*KnapSpecConfig.field_names(), *_VLLM_KEYS))
