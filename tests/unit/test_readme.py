# SPDX-License-Identifier: Apache-2.0
"""READMEs and configs/ say what the code does, and their commands are ones that can be given."""

from __future__ import annotations

import dataclasses
import importlib.util
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


def test_links() -> None:
    """Of every page: to files that are there, and to headings that their page has."""
    for page in READMES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]+)?\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", file.read_text(), re.M)
                known = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
                assert anchor[1:] in known, f"{page.name}: {target}{anchor}"


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


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_key_of_a_serve_config_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    bare = [lines[i] for i in keys if not lines[i - 1].strip().startswith("#")]
    assert not bare


READMES = [
    ROOT / name
    for name in (
        "README.md", "docker/README.md", "configs/README.md", "kernels/README.md",
        "knapspec_vllm/README.md", "tests/benchmarks/README.md",
    )
]  # fmt: skip
#: Files that say in their comments how to use them.
COMMENTED = [
    path
    for folder in ("configs", "docker")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".yaml", ".yml") or path.name.startswith("Dockerfile")
]
#: Programs whose commands are not run, and why. That the files they name exist, and that vLLM takes
#: the arguments in them, is checked.
NOT_RUN = {
    "docker": "no container engine is where this is developed",
    "kubectl": "no cluster is; what it builds from kustomizations is tested in test_deployment",
    "helm": "no cluster is",
    "pip": "the environment of these tests is made by .ci/bootstrap.py, with the same wheel",
}
#: Run by tests/integration/test_live_server.py, as they stand in the READMEs.
RUN_ELSEWHERE = ("curl",)


def commands() -> list[tuple[Path, str]]:
    """Every command of a console block or a comment, continuation lines joined, comments cut."""
    found = []
    for readme in READMES:
        for block in re.findall(r"^```console\n(.*?)^```", readme.read_text(), re.M | re.S):
            found += [(readme, line) for line in block.replace("\\\n", " ").splitlines()]
        found += [(readme, line) for line in re.findall(r"`(make [^`]+)`", readme.read_text())]
    for path in COMMENTED:
        text = re.sub(r"\\\n#\s+", " ", path.read_text())
        found += [
            (path, line) for line in re.findall(r"^\s*#\s+((?:docker|vllm \w+) [^-].*)", text, re.M)
        ]
        found += [(path, line) for line in re.findall(r"^\s*#\s+(helm \w+ \w+.*)", text, re.M)]
    return [(path, line) for path, line in found if split(line)]


def split(line: str) -> list[str]:
    """Words as a shell has them, `$(a command)` as a part of one; without a comment."""
    masked = re.sub(r"\$\([^)]*\)", lambda found: found[0].replace(" ", "\0"), line)
    return [word.replace("\0", " ") for word in shlex.split(masked, comments=True)]


def _knapspec(words: list[str]) -> None:
    make_parser().parse_args(words[1:])


def _vllm(words: list[str]) -> None:
    """The model may be left to the reader, as may be what `bench` and others take."""
    assert words[1] in ("serve", "bench"), words
    if words[1] == "serve":
        parsed = parse_serve(words[2:])
        check_selected(parsed.speculative_config, parsed.additional_config)


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words[1:] if "=" not in word]
    assert targets, words
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), words
    for variable in set(words[1:]) - set(targets):
        assert re.search(rf"\b{variable.partition('=')[0]}\b", makefile), words


def _python(words: list[str]) -> None:
    """Scripts and modules exist and have the options that are given; so do tests."""
    if words[1] == "-m" and words[2] != "pytest":
        assert importlib.util.find_spec(words[2]), words
        return
    files = [word for word in words[1:] if re.match(r"(tests|kernels|\.ci)/", word)]
    assert files, words
    for file in files:
        assert (ROOT / file).exists(), words
    if words[1] in files:
        source = (ROOT / words[1]).read_text()
        for option in words[2:]:
            if option.startswith("--"):
                assert f'"{option}"' in source, words


def _not_run(words: list[str]) -> None:
    """Files that are named exist; a container's arguments are those of `vllm serve`."""
    for flag, name in pairwise(words):
        if flag in ("-f", "-k") and "/" in name:
            assert (ROOT / name).exists(), words
    image = next((i for i, word in enumerate(words) if word.startswith("knapspec-vllm")), None)
    if words[:2] == ["docker", "run"]:
        assert image is not None
        _vllm(["vllm", "serve", *words[image + 1 :]])


READERS: dict[str, Callable[[list[str]], None]] = {
    "knapspec": _knapspec,
    "vllm": _vllm,
    "make": _make,
    "python": _python,
    ".venv/bin/python": _python,
    **dict.fromkeys((*NOT_RUN, *RUN_ELSEWHERE), _not_run),
}


def read(words: list[str]) -> str | None:
    """Check one command, its variables aside; gives its program."""
    words = words[1:] if words[0] == "export" else words
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        inner = re.fullmatch(r"\w+=\$\((.*)\)", words[0])
        if inner:
            read(split(inner[1]))
        words = words[1:]
    if not words:
        return None
    READERS[words[0]](words)
    return words[0]


@pytest.mark.parametrize(("readme", "command"), commands(), ids=lambda value: str(value)[:60])
def test_commands(readme: Path, command: str) -> None:
    read(_first(split(command)))


def _first(words: list[str]) -> list[str]:
    """What stands before a pipe; what follows shows its output."""
    return words[: words.index("|")] if "|" in words else words


def test_commands_are_found() -> None:
    programs = {read(_first(split(command))) for _, command in commands()}
    assert programs - {None} == set(READERS)
