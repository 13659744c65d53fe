# SPDX-License-Identifier: Apache-2.0
"""Command lines of `vllm serve` as vLLM reads them, and YAML merged as its readers merge it."""

from __future__ import annotations

import importlib
from typing import Any

from knapspec_vllm.config import KnapSpecConfig

#: Where vLLM 0.26, 0.32 and 0.33 keep the parser of `vllm serve`.
PARSER_MODULES = tuple(
    f"vllm.entrypoints.{place}.cli_args" for place in ("openai", "launchers", "common")
)


def parse_serve(arguments: list[str]) -> Any:
    """What `vllm serve` makes of its arguments, by its own parser."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from knapspec_vllm.plugin import register

    register()
    cli_args = next(filter(None, map(_module, PARSER_MODULES)))
    parsed = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    cli_args.validate_parsed_serve_args(parsed)
    return parsed


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


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
