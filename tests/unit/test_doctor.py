# SPDX-License-Identifier: Apache-2.0
"""What `knapspec doctor` says about an installation and about a model."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm import compat, doctor
from knapspec_vllm.doctor import Check
from knapspec_vllm.patches import apply


def by_name(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("vllm")
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
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    yield str(tmp_path)
    apply.restore_all()


def test_every_check_has_a_reason_and_advice_where_something_is_wrong() -> None:
    for check in doctor.examine():
        assert check.reason.endswith(".")
        assert check.status in ("ok", "warn", "refused")
        assert check.status == "ok" or check.advice


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    if compat.installed_tree() is None:
        assert doctor._versions().status == "refused"
        return
    assert doctor._versions().status == "ok"
    monkeypatch.setattr(compat, "TESTED_MAX", (0, 1))
    assert doctor._versions().status == "refused"
    monkeypatch.setenv("KNAPSPEC_ALLOW_UNTESTED_VLLM", "1")
    assert doctor._versions().status == "warn"


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("KNAPSPEC_DISABLE", "1")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    checks = doctor.examine()
    assert by_name(checks, "VLLM_PLUGINS").status == "refused"
    assert by_name(checks, "KNAPSPEC_DISABLE").status == "warn"
    assert by_name(checks, "model runner").status == "refused"
    monkeypatch.setenv("VLLM_PLUGINS", "other, knapspec")
    assert by_name(doctor.examine(), "VLLM_PLUGINS").status == "ok"


@pytest.mark.parametrize("where", ["speculative_config", "additional_config"])
def test_store(where: str, tmp_path: Path) -> None:
    def found(folder: Path) -> doctor.Check:
        settings = {"store_dir": str(folder)}
        nested = {"knapspec": settings} if where == "additional_config" else settings
        return by_name(doctor.examine(None, {where: nested}), "calibration store")

    new = tmp_path / "not" / "yet" / "there"
    assert found(new).status == "ok"
    assert str(new) in found(new).reason
    assert not new.exists()
    file = tmp_path / "file"
    file.write_text("")
    assert found(file).status == "warn"


@pytest.mark.parametrize("given", [{}, {"additional_config": []}, {"speculative_config": "ngram"}])
def test_store_beside_vllm_s_cache(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    check = by_name(doctor.examine(None, given), "calibration store")
    assert check.reason == f"{tmp_path} can be written."


def test_scheduling() -> None:
    """Only a GPU has something to lose by it."""
    for device, on, warned in (("cuda", False, 1), ("cuda", True, 0), ("cpu", False, 0)):
        config = SimpleNamespace(
            device_config=SimpleNamespace(device_type=device),
            scheduler_config=SimpleNamespace(async_scheduling=on),
        )
        found = doctor._scheduling(config)
        assert [check.status for check in found] == ["warn"] * warned


def test_worst() -> None:
    checks = [Check("a", "ok", "."), Check("b", "warn", "."), Check("c", "refused", ".")]
    assert doctor.worst(checks) == "refused"
    assert doctor.worst(checks[:2]) == "warn"
    assert doctor.worst([]) == "ok"


def test_a_model_that_can_be_served(model: str) -> None:
    arguments = {"skip_tokenizer_init": True, "max_model_len": 128}
    check = by_name(doctor.examine(model, arguments), "model")
    assert (check.status, check.reason) == ("ok", "LlamaForCausalLM can be served.")


def test_a_model_that_would_be_refused(model: str) -> None:
    arguments = {"skip_tokenizer_init": True, "max_model_len": 128, "enable_lora": True}
    check = by_name(doctor.examine(model, arguments), "model")
    assert check.status == "refused"
    assert check.reason == "--enable-lora is not supported; remove it."
