# SPDX-License-Identifier: Apache-2.0
"""Version range and capability probes, on made-up source trees and on the installed vLLM."""

import os
from pathlib import Path

import pytest

from knapspec_vllm import compat, patches
from knapspec_vllm.compat import Seam, UnsupportedVllmError

#: Unpacked vLLM source trees (the `vllm` folders) to probe besides the installed one.
MORE_TREES = [Path(p) for p in os.environ.get("KNAPSPEC_TEST_VLLM_TREES", "").split(":") if p]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "__init__.py").write_text("NAME = 1\n")
    (tmp_path / "runner.py").write_text(
        "class Runner:\n"
        "    batch: int = 0\n"
        "    def propose(self, tokens, *, metadata=None): ...\n"
        "    @property\n"
        "    def lookahead(self): return 0\n"
        "def load(path, /): ...\n"
    )
    (tmp_path / "_version.py").write_text("__version__: str\n__version__ = version = '0.29.1'\n")
    return tmp_path


@pytest.mark.parametrize(
    "seam",
    [
        Seam("vllm.runner:Runner.propose", ("tokens", "metadata")),
        Seam("vllm.runner:Runner.lookahead"),
        Seam("vllm.runner:Runner", ("batch",)),
        Seam("vllm.runner:load", ("path",)),
        Seam("vllm.config:NAME"),
        Seam("vllm.config"),
    ],
    ids=lambda seam: seam.target,
)
def test_probe_finds(seam: Seam, tree: Path) -> None:
    assert compat.probe(seam, tree) is None


@pytest.mark.parametrize(
    "seam, words",
    [
        (Seam("vllm.runner:Runner.propose", ("tokens", "logits")), "has no parameter logits"),
        (Seam("vllm.runner:Runner.drafts"), "vllm.runner.Runner.drafts is gone"),
        (Seam("vllm.runner:Walker.propose"), "vllm.runner.Walker.propose is gone"),
        (Seam("vllm.walker:Walker"), "module vllm.walker is gone"),
        (Seam("vllm.runner:Runner", ("rows",)), "has no parameter rows"),
    ],
    ids=lambda value: getattr(value, "target", None),
)
def test_probe_says_what_is_missing(seam: Seam, words: str, tree: Path) -> None:
    assert words in str(compat.probe(seam, tree))


@pytest.mark.parametrize(
    "version, tested",
    [
        ("0.26.0", True),
        ("0.32.0+cu129", True),
        ("0.33.1.dev12+gabc", True),
        ("0.25.9", False),
        ("0.34.0", False),
        ("1.0.0", False),
        ("0.1.dev1", False),
        ("unknown", False),
    ],
)
def test_tested_range(version: str, tested: bool) -> None:
    assert compat.is_tested(version) is tested


def test_outside_the_range_says_found_supported_and_what_to_do(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compat.version_of(tree) == "0.29.1"
    compat.check_version(tree)
    (tree / "_version.py").write_text("__version__ = version = '0.99.0'\n")
    with pytest.raises(UnsupportedVllmError) as caught:
        compat.check_version(tree)
    for words in ("0.99.0", compat.supported_range(), "KNAPSPEC_ALLOW_UNTESTED_VLLM=1"):
        assert words in str(caught.value)
    monkeypatch.setenv("KNAPSPEC_ALLOW_UNTESTED_VLLM", "1")
    compat.check_version(tree)


def test_installed_vllm_has_everything_we_bind() -> None:
    found = compat.installed_tree()
    if found is None:
        pytest.skip("vLLM is not installed")
    assert patches.problems(found) == []
    assert compat.is_tested(compat.version_of(found))


@pytest.mark.parametrize("other", MORE_TREES, ids=str)
def test_other_vllm_sources_have_everything_we_bind(other: Path) -> None:
    assert compat.is_tested(compat.version_of(other))
    assert patches.problems(other) == []


def test_live_signature_check() -> None:
    def function(a: int, *, b: int) -> None: ...

    assert compat.missing_parameters(function, ("a", "b")) == []
    assert compat.missing_parameters(function, ("a", "c")) == ["c"]
