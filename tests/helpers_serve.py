# SPDX-License-Identifier: Apache-2.0
"""Command lines of `vllm serve` as vLLM reads them, and YAML merged as its readers merge it."""

from __future__ import annotations

from typing import Any

from knapspec_vllm.commands.vllm_options import serve_module, serve_parser
from knapspec_vllm.config import KnapSpecConfig


def parse_serve(arguments: list[str]) -> Any:
    """What `vllm serve` makes of its arguments, by its own parser."""
    parsed = serve_parser().parse_args(arguments)
    serve_module().validate_parsed_serve_args(parsed)
    return parsed


def check_selected(speculative: dict[str, Any], additional: dict[str, Any] | None) -> None:
    assert speculative["method"] == "knapspec"
    KnapSpecConfig.from_mapping((additional or {}).get("knapspec", {}))


def merged(base: Any, patch: Any) -> Any:
    """Kubernetes' strategic merge, as far as these overlays use it: lists of named things."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            **base,
            **{k: merged(base[k], v) if k in base else v for k, v in patch.items()},
        }
    if isinstance(base, list) and all(isinstance(x, dict) and "name" in x for x in [*base, *patch]):
        found = {item["name"]: item for item in base}
        for item in patch:
            found[item["name"]] = merged(found.get(item["name"], {}), item)
        return list(found.values())
    return patch
