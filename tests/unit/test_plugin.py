# SPDX-License-Identifier: Apache-2.0
"""The entry point: silent, light, re-entrant, and no harm when it cannot run."""

import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from knapspec_vllm import compat, plugin
from knapspec_vllm.patches import apply, arg_utils

pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # vLLM would call it at the first EngineArgs and patch behind our back
    apply.restore_all()
    yield
    apply.restore_all()


@pytest.fixture
def model(tmp_path: Path) -> str:
    return tiny_llama(tmp_path)


def tiny_llama(folder: Path) -> str:
    """A model folder with a config and no weights: enough to build an engine config."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_entry_point_is_short() -> None:
    assert len(inspect.getsource(plugin).splitlines()) <= 90


def test_register_is_light_and_silent() -> None:
    code = (
        "import sys, vllm.config, vllm.engine.arg_utils\n"
        "from knapspec_vllm.plugin import register\n"
        "register(); register()\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "for name in ('vllm.v1.worker.gpu_model_runner', 'vllm.v1.worker.cpu_model_runner',\n"
        "             'knapspec_vllm.draft', 'knapspec_vllm.planner', 'knapspec_vllm.models'):\n"
        "    assert name not in sys.modules, name\n"
        "from knapspec_vllm.patches import apply\n"
        "assert 'short_form' in apply.installed()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "KnapSpec" not in done.stdout + done.stderr


@pytest.mark.usefixtures("clean")
def test_register_twice_patches_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    once = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is once


@pytest.mark.usefixtures("clean")
def test_unsupported_vllm_changes_nothing_unless_selected(
    monkeypatch: pytest.MonkeyPatch, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(compat, "TESTED_MAX", (0, 1))
    with caplog.at_level(logging.DEBUG, logger="vllm.knapspec"):
        plugin.register()
    assert apply.installed() == ("short_form",)  # the one that says why
    assert len(caplog.records) <= 1
    args = {"model": model, "skip_tokenizer_init": True, "max_model_len": 128}
    assert EngineArgs(**args).create_engine_config().speculative_config is None
    for speculative in (
        {"method": "knapspec"},
        {"model": "knapspec_vllm.KnapSpecProposer", "num_speculative_tokens": 2},
    ):
        with pytest.raises(compat.UnsupportedVllmError, match="supported is"):
            EngineArgs(**args, speculative_config=speculative).create_engine_config()


@pytest.mark.usefixtures("clean")
def test_a_changed_target_undoes_everything(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    monkeypatch.setattr(WorkerBase, "__init__", lambda self, other: None)
    plugin.register()
    assert apply.installed() == ("short_form",)
    args = EngineArgs(model=model, speculative_config={"method": "knapspec"})
    with pytest.raises(apply.PatchError, match="no longer takes vllm_config"):
        args.create_engine_config()


@pytest.mark.usefixtures("clean")
def test_missing_capability_is_said_at_config_time(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    monkeypatch.setattr("knapspec_vllm.patches.problems", lambda tree: ["x.y is gone"])
    arg_utils.require_capabilities.cache_clear()
    args = EngineArgs(model=model, speculative_config={"method": "knapspec"})
    with pytest.raises(compat.UnsupportedVllmError, match=r"x\.y is gone"):
        args.create_engine_config()
    arg_utils.require_capabilities.cache_clear()


@pytest.mark.usefixtures("clean")
def test_kill_switch_serves_without_speculation(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("KNAPSPEC_DISABLE", "1")
    plugin.register()
    for given in (
        {"speculative_config": {"method": "knapspec", "bins": 16}},
        {"spec_method": "knapspec", "spec_tokens": 4},
    ):
        args = EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=128, **given)
        assert args.create_engine_config().speculative_config is None
