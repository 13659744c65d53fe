# SPDX-License-Identifier: Apache-2.0
"""What `knapspec doctor` finds: whether KnapSpec would run here, and if not, what to do.

`examine()` looks at the installation without importing vLLM; with a model it also builds the
engine config (no weights, no device memory) and reports what would be refused.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import knapspec_vllm
from knapspec_vllm import compat, envs
from knapspec_vllm.commands.vllm_options import check_engine_args
from knapspec_vllm.config import ADDITIONAL_CONFIG_KEY

Status = Literal["ok", "warn", "refused"]

#: Name of the entry point in setup.py, and in VLLM_PLUGINS.
PLUGIN_NAME = "knapspec"


@dataclass(frozen=True)
class Check:
    """One finding. `advice` is empty when there is nothing to do."""

    name: str
    status: Status
    reason: str
    advice: str = ""


def examine(model: str | None = None, engine_args: Mapping[str, Any] | None = None) -> list[Check]:
    """All findings, most basic first.

    model: name or path to check as well; None checks the installation only. engine_args: keyword
    arguments of vLLM's EngineArgs to check it with; KnapSpec's settings may be among them.
    """
    checks = [_versions(), _capabilities(), _entry_point(), _plugin_filter(), _kill_switch()]
    checks += [_runner(), _device(), _store(_store_dir(engine_args or {}))]
    if model is not None:
        checks += _model(model, dict(engine_args or {}))
    return checks


def worst(checks: list[Check]) -> Status:
    """The most serious status of `checks`; "ok" for none."""
    order: tuple[Status, ...] = ("refused", "warn", "ok")
    return next((status for status in order if any(c.status == status for c in checks)), "ok")


def _versions() -> Check:
    python = ".".join(map(str, sys.version_info[:3]))
    tree = compat.installed_tree()
    found = compat.version_of(tree) if tree is not None else "not installed"
    text = f"knapspec-vllm {knapspec_vllm.__version__}, vLLM {found}, Python {python}"
    try:
        compat.check_version()
    except compat.UnsupportedVllmError as error:
        return Check("versions", "refused", f"{text}.", str(error))
    if not compat.is_tested(found):
        return Check(
            "versions",
            "warn",
            f"{text}: outside the tested range ({compat.supported_range()}), admitted by "
            f"{envs.ALLOW_UNTESTED_VLLM}.",
            "Test greedy parity before serving.",
        )
    return Check("versions", "ok", f"{text}.")


def _capabilities() -> Check:
    from knapspec_vllm.patches import problems

    tree = compat.installed_tree()
    found = problems(tree) if tree is not None else ["vLLM is not installed"]
    if found:
        return Check(
            "capabilities",
            "refused",
            "; ".join(found) + ".",
            f"Install a vLLM of {compat.supported_range()}.",
        )
    return Check("capabilities", "ok", "every place of vLLM that is patched or read is there.")


def _entry_point() -> Check:
    names = [entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if names.count(PLUGIN_NAME) == 1:
        return Check("entry point", "ok", "vLLM will load the plugin in every process.")
    if PLUGIN_NAME in names:
        return Check(
            "entry point",
            "warn",
            "the plugin is registered more than once.",
            "Keep one installation of knapspec-vllm on sys.path.",
        )
    return Check(
        "entry point",
        "refused",
        "vLLM does not see the plugin.",
        "Install the package in vLLM's environment: pip install --no-deps -e . in its checkout.",
    )


def _plugin_filter() -> Check:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in [name.strip() for name in allowed.split(",")]:
        return Check(
            "VLLM_PLUGINS",
            "refused",
            f"VLLM_PLUGINS='{allowed}' leaves the plugin out.",
            f"Add {PLUGIN_NAME} to VLLM_PLUGINS or unset it.",
        )
    return Check("VLLM_PLUGINS", "ok", "the plugin is not filtered out.")


def _kill_switch() -> Check:
    if envs.disabled():
        return Check(
            envs.DISABLE,
            "warn",
            f"{envs.DISABLE} is set: servers told to use KnapSpec start without speculation.",
            f"Unset {envs.DISABLE}.",
        )
    return Check(envs.DISABLE, "ok", "not set.")


def _runner() -> Check:
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "").strip() == "1":
        return Check(
            "model runner",
            "refused",
            "VLLM_USE_V2_MODEL_RUNNER=1 asks for a model runner KnapSpec does not support yet.",
            "Unset VLLM_USE_V2_MODEL_RUNNER.",
        )
    return Check("model runner", "ok", "V1 will be used.")


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", "refused", f"{error}.", "Install vLLM, which brings its torch.")
    if torch.cuda.is_available():
        return Check("device", "ok", f"{torch.cuda.get_device_name(0)}.")
    return Check(
        "device",
        "warn",
        "no GPU: KnapSpec runs on CPU, where verifying drafts often costs more than it gains.",
        "Expect it to decline to speculate when it would lose.",
    )


def _store_dir(engine_args: Mapping[str, Any]) -> str | None:
    """The setting, from either place in which it may be written."""
    additional = engine_args.get("additional_config")
    nested = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, Mapping) else None
    for place in (nested, engine_args.get("speculative_config")):
        if isinstance(place, Mapping) and isinstance(place.get("store_dir"), str):
            return str(place["store_dir"])
    return None


def _store(store_dir: str | None) -> Check:
    cache = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vllm"
    )
    folder = Path(store_dir or cache).expanduser()
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(
            "calibration store",
            "warn",
            f"{existing} cannot be written ({error.strerror}): every start measures again.",
            "Set store_dir to a writable folder, in Kubernetes on a volume.",
        )
    return Check("calibration store", "ok", f"{folder} can be written.")


def _model(model: str, engine_args: dict[str, Any]) -> list[Check]:
    """Build the engine config as a server would, with KnapSpec selected."""
    from knapspec_vllm.plugin import register

    register()
    engine_args.setdefault("speculative_config", {"method": "knapspec"})
    try:
        from vllm.engine.arg_utils import EngineArgs

        check_engine_args(engine_args)
        config = EngineArgs(model=model, **engine_args).create_engine_config()
    except Exception as error:
        return [
            Check("model", "refused", sentence, "Change that setting or serve without KnapSpec.")
            for sentence in sentences(error)
        ]
    if config.speculative_config is None:
        return [Check("model", "warn", f"{model} would be served without speculation.")]
    checks = [Check("model", "ok", f"{config.model_config.architecture} can be served.")]
    checks += _scheduling(config)
    if config.parallel_config.distributed_executor_backend == "ray":
        checks.append(
            Check(
                "ray",
                "warn",
                "workers on other nodes load the plugin from their own environment.",
                "Install knapspec-vllm on every node.",
            )
        )
    return checks


def _scheduling(config: Any) -> list[Check]:
    """What selecting KnapSpec costs on a GPU: 0.70x and 0.73x where it declines (H200, 8B)."""
    if config.device_config.device_type != "cuda" or config.scheduler_config.async_scheduling:
        return []
    return [
        Check(
            "scheduling",
            "warn",
            "asynchronous scheduling is off: where KnapSpec declines, a GPU then decodes more "
            "slowly than with plain vLLM.",
            "Leave out --no-async-scheduling, if it is there; else compare with knapspec bench.",
        )
    ]


def sentences(error: BaseException) -> list[str]:
    """The sentences of a config error, without pydantic's frame around them."""
    errors = getattr(error, "errors", None)
    texts = [str(error)]
    if callable(errors):
        texts = [str(item.get("msg", item)) for item in errors()]
    lines = [line.removeprefix("Value error, ") for text in texts for line in text.splitlines()]
    return [line.removeprefix("KnapSpec: ") for line in lines if line.strip()]
