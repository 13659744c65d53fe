# SPDX-License-Identifier: Apache-2.0
"""READMEs and configs/ say what the code does, and their commands are ones that can be given."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from knapspec_vllm.cli import make_parser
from knapspec_vllm.config import KnapSpecConfig
from tests.helpers_serve import check_selected, parse_serve

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("field", dataclasses.fields(KnapSpecConfig), ids=lambda f: f.name)
def test_settings_table(field: dataclasses.Field) -> None:
    """Every setting is listed with its default."""
    assert f"| `{field.name}` | `{json.dumps(field.default)}` |" in README


def test_named_files_and_targets_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?:tests|configs)/[\w/.-]+\.(?:py|yaml)", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


SERVE_CONFIGS = sorted(
    [*(ROOT / "configs/serve").glob("*.yaml"), *(ROOT / "configs/kubernetes").rglob("serve.yaml")]
)


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_serve_configs_parse(path: Path) -> None:
    """vLLM's own parser accepts the file, and our settings in it are known."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--config")
    arguments = parser.parse_args(["--model", "some/model", "--config", str(path)])
    assert arguments.speculative_config["method"] == "knapspec"
    KnapSpecConfig.from_mapping((arguments.additional_config or {}).get("knapspec", {}))
    assert yaml.safe_load(path.read_text())["speculative-config"] == arguments.speculative_config


READMES = [ROOT / name for name in ("README.md", "docker/README.md", "configs/README.md")]
#: Commands of programs that are not here: their files are checked, and nothing else can be.
ELSEWHERE = ("curl", "kubectl", "helm", "docker", "pip")


def commands() -> list[tuple[Path, str]]:
    """Every command of a console block, continuation lines joined, comments cut."""
    found = []
    for readme in READMES:
        for block in re.findall(r"^```console\n(.*?)^```", readme.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append((readme, shlex.join(words)))
    return found


def _knapspec(words: list[str]) -> None:
    make_parser().parse_args(words[1:])


def _vllm(words: list[str]) -> None:
    parsed = parse_serve(words[2:])
    check_selected(parsed.speculative_config, parsed.additional_config)


def _make(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words


def _python(words: list[str]) -> None:
    files = [word for word in words[1:] if "/" in word]
    assert files, words
    for file in files:
        assert (ROOT / file).exists(), words


def _elsewhere(words: list[str]) -> None:
    """Files that are named exist; a container's arguments are those of `vllm serve`."""
    for flag, name in pairwise(words):
        if flag in ("-f", "-k") and "/" in name:
            assert (ROOT / name).exists(), words
    image = next((i for i, word in enumerate(words) if word.startswith("knapspec-vllm:")), None)
    if words[:2] == ["docker", "run"]:
        assert image is not None
        _vllm(["vllm", "serve", *words[image + 1 :]])


READERS: dict[str, Callable[[list[str]], None]] = {
    "knapspec": _knapspec,
    "vllm": _vllm,
    "make": _make,
    ".venv/bin/python": _python,
    **dict.fromkeys(ELSEWHERE, _elsewhere),
}


@pytest.mark.parametrize(("readme", "command"), commands(), ids=lambda value: str(value)[:60])
def test_commands(readme: Path, command: str) -> None:
    # The plan's first pipe is the command; what follows shows its output.
    words = shlex.split(command)
    words = words[: words.index("|")] if "|" in words else words
    READERS[words[0]](words)


def test_commands_are_found() -> None:
    programs = {shlex.split(command)[0] for _, command in commands()}
    assert programs == set(READERS)
