# SPDX-License-Identifier: Apache-2.0
"""vllm.engine.arg_utils: the short form of --speculative-config, and --spec-method knapspec."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

from knapspec_vllm import compat, envs
from knapspec_vllm.metrics import exposition, run_folder
from knapspec_vllm.patches import apply, selection
from knapspec_vllm.patches.ledger import by_name

logger = logging.getLogger("vllm.knapspec")

#: Why KnapSpec cannot run in this process; raised once somebody selects it.
_refusal: Exception | None = None


def install(refusal: Exception | None = None) -> None:
    """Wrap the config-time functions. `refusal`: raise this when KnapSpec is selected."""
    global _refusal
    _refusal = refusal
    names = ("short_form",) if refusal is not None else ("short_form", "spec_method_choice")
    makers = {"short_form": _make_create, "spec_method_choice": _make_add_cli_args}
    for name in names:
        patch = by_name(name)
        owner, attribute = compat.resolve(patch.target)
        apply.replace(name, owner, attribute, makers[name], patch.seam.parameters)


def _make_create(original: Any) -> Any:
    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.speculative_config, dict | None) and selection.is_requested(
            self.speculative_config, self.spec_method, self.spec_model
        ):
            _prepare(self)
        return original(self, *args, **kwargs)

    return create_speculative_config


def _prepare(engine_args: Any) -> None:
    """Rewrite the arguments in place, so that vLLM's own code sees only its own forms."""
    if envs.disabled():
        logger.warning("%s is set: serving without speculation.", envs.DISABLE)
        engine_args.speculative_config = None
        engine_args.spec_method = engine_args.spec_model = engine_args.spec_tokens = None
        return
    if _refusal is not None:
        raise _refusal
    require_capabilities()
    given = {str(k).replace("-", "_"): v for k, v in (engine_args.speculative_config or {}).items()}
    for flag, key, value in (
        ("--spec-method", "method", engine_args.spec_method),
        ("--spec-model", "model", engine_args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", engine_args.spec_tokens),
    ):
        if value is not None and key in given:
            raise ValueError(f"{flag} and --speculative-config['{key}'] are mutually exclusive")
        if value is not None:
            given[key] = value
    rewritten = selection.rewrite(given, engine_args.additional_config, _speculative_keys())
    engine_args.spec_method = engine_args.spec_model = engine_args.spec_tokens = None
    engine_args.speculative_config = rewritten.speculative_config
    engine_args.additional_config = rewritten.additional_config
    if (folder := run_folder.create()) is not None:
        exposition.install(folder)


@functools.cache
def require_capabilities() -> None:
    """Raise UnsupportedVllmError when the installed vLLM lacks a place we bind.

    Reads source only; runs once, in the process that builds the config, when KnapSpec is selected.
    """
    from knapspec_vllm.patches import problems

    tree = compat.installed_tree()
    if tree is not None and (found := problems(tree)):
        raise compat.UnsupportedVllmError(compat.version_of(tree), found)


def _speculative_keys() -> frozenset[str]:
    from vllm.config import SpeculativeConfig

    return frozenset(field.name for field in dataclasses.fields(SpeculativeConfig))


def _make_add_cli_args(original: staticmethod[..., Any]) -> Any:
    @functools.wraps(original.__func__)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original.__func__(parser, *args, **kwargs)
        for action in getattr(parser, "_actions", ()):
            choices = action.choices
            if action.dest == "spec_method" and choices and selection.METHOD not in choices:
                action.choices = [*choices, selection.METHOD]
        return parser

    return staticmethod(add_cli_args)
