# SPDX-License-Identifier: Apache-2.0
"""`knapspec serve-args`: every form says the same, and its readers can read it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import yaml

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.cli import main
from knapspec_vllm.commands.serve_args import FORMS

SETTINGS = '{"window_tokens": 1024, "min_speedup": 1.05}'
WANTED = (
    {"method": "knapspec", "num_speculative_tokens": 5},
    {"knapspec": {"window_tokens": 1024, "min_speedup": 1.05}},
)


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["serve-args", *arguments]) == 0
    return capsys.readouterr().out


def read(form: str, text: str) -> tuple[dict, dict]:
    """(speculative_config, additional_config) as the reader of a form gets them."""
    if form == "shell":
        words = shlex.split(text)
        pairs = dict(zip(words[3::2], words[4::2], strict=True))
        return json.loads(pairs["--speculative-config"]), json.loads(pairs["--additional-config"])
    value = json.loads(text) if form == "json" else yaml.safe_load(text)
    if form == "helm":
        items = value["vllmConfig"]["extraArgs"]
        assert items[::2] == ["--speculative-config", "--additional-config"]
        return json.loads(items[1]), json.loads(items[3])
    value = value.get("engine_kwargs", value)
    value = {key.replace("-", "_"): entry for key, entry in value.items()}
    return value["speculative_config"], value["additional_config"]


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, capsys: pytest.CaptureFixture) -> None:
    text = printed(
        capsys, "--format", form, "--settings", SETTINGS, "--num-speculative-tokens", "5"
    )
    assert read(form, text) == WANTED


def test_defaults_need_no_settings(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys)
    assert "additional" not in text
    assert shlex.split(text)[:3] == ["vllm", "serve", "MODEL"]


def test_misspelt_settings_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["serve-args", "--settings", '{"windw_tokens": 3}']) == 1
    found = capsys.readouterr()
    assert not found.out
    assert "did you mean 'window_tokens'" in found.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-speculative-tokens", "33"], "num_speculative_tokens is 33; write 1 to 32."),
        (
            ["--num-speculative-tokens", "2", "--settings", '{"draft_length": 3}'],
            "raise num_speculative_tokens or lower draft_length",
        ),
    ],
)
def test_token_counts_are_checked_without_a_model(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["serve-args", *arguments]) == 1
    found = capsys.readouterr()
    assert not found.out
    assert words in found.err


def test_the_model_is_checked_with_them() -> None:
    """Standard output is the answer alone, whatever vLLM logs."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "knapspec_vllm.cli", "serve-args", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    model = str(random_checkpoint("LlamaForCausalLM"))
    fine = run(model, "--format", "json")
    assert fine.returncode == 0, fine.stderr
    assert json.loads(fine.stdout)["speculative_config"]["method"] == "knapspec"
    refused = run(model, "--engine-args", '{"enable_lora": true, "max_lora_rank": 8}')
    assert refused.returncode == 1
    assert not refused.stdout
    assert "--enable-lora is not supported" in refused.stderr
