# SPDX-License-Identifier: Apache-2.0
"""Command lines of `vllm serve`, read as vLLM reads them."""

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
