# SPDX-License-Identifier: Apache-2.0
"""Options of vLLM that our commands are given: read by vLLM's own parser, misspelt ones refused."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_PARSER_MODULES = tuple(
    f"vllm.entrypoints.{place}.cli_args" for place in ("openai", "launchers", "common")
)
"""Where vLLM 0.26, 0.32 and 0.33 keep the parser of `vllm serve`."""


def check_engine_args(given: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that no engine argument has. None given: imports nothing."""
    if not given:
        return
    from vllm.engine.arg_utils import EngineArgs

    _check(given, {f.name for f in dataclasses.fields(EngineArgs)}, "--engine-args has")


def serve_parser() -> Any:
    """The parser of `vllm serve`'s arguments, which takes the model as `model_tag`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from knapspec_vllm.plugin import register

    register()
    return serve_module().make_arg_parser(FlexibleArgumentParser())


def serve_module() -> Any:
    """vLLM's module that makes and validates them. Raises ImportError where there is none."""
    for name in _PARSER_MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"this vLLM has none of {', '.join(_PARSER_MODULES)}")


def serve_options(path: Path) -> dict[str, Any]:
    """A `vllm serve --config` file as keyword arguments of the engine.

    Options of the HTTP server and of data parallelism, whose engines are alike, are left out.
    Raises ValueError for a file that is no mapping, or with an option that vLLM does not know.
    """
    import yaml
    from vllm.engine.arg_utils import EngineArgs

    try:
        entries = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is not a mapping of vllm serve's options")
    parser = serve_parser()
    flags = {flag.removeprefix("--") for flag in parser._option_string_actions}
    names = [str(key).partition(".")[0].replace("_", "-") for key in entries]
    _check(names, flags, f"{path} has")
    # Not EngineArgs: making one looks for the model.
    given = vars(parser.parse_args(["--config", str(path)]))
    defaults = vars(parser.parse_args([]))
    found = {
        field.name: given[field.name]
        for field in dataclasses.fields(EngineArgs)
        if given.get(field.name) != defaults.get(field.name)
        and field.name != "model"
        and not field.name.startswith("data_parallel")
    }
    method, count = found.pop("spec_method", None), found.pop("spec_tokens", None)
    if method is not None:
        found["speculative_config"] = {"method": method, "num_speculative_tokens": count or 8}
    return found


def _check(given: Collection[str], known: Collection[str], whose: str) -> None:
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, 1)
        advice = f": write {near[0]}" if near else ""
        raise ValueError(f"{whose} {name!r}, which this vLLM does not know{advice}")
