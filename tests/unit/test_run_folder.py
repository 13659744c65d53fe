# SPDX-License-Identifier: Apache-2.0
"""Where the processes of one server meet, and those of another do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from knapspec_vllm.metrics import run_folder


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KNAPSPEC_RUN_FOLDER", raising=False)
    monkeypatch.setattr(run_folder, "_made", None)


@pytest.mark.usefixtures("no_folder")
def test_run_folder_reaches_children_and_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    assert run_folder.current() is None
    folder = run_folder.create()
    assert folder is not None
    assert run_folder.create() == folder == run_folder.current()
    assert os.environ["KNAPSPEC_RUN_FOLDER"] == str(folder)
    copied = os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"].split(",")
    ours = ["KNAPSPEC_RUN_FOLDER", "KNAPSPEC_KERNELS", "KNAPSPEC_ALLOW_UNTESTED_VLLM"]
    assert copied == ["MINE", *ours]
    run_folder._remove(folder, os.getpid() + 1)  # a forked child's exit
    assert folder.is_dir()
    run_folder._remove(folder, os.getpid())
    assert run_folder.current() is None


@pytest.mark.usefixtures("no_folder")
def test_run_folder_of_another_server_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that has an engine itself starts servers with its environment."""
    monkeypatch.setenv("KNAPSPEC_RUN_FOLDER", str(tmp_path))
    own = run_folder.create()
    assert own not in (None, tmp_path)
    monkeypatch.setenv("KNAPSPEC_RUN_FOLDER", str(tmp_path))
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    assert run_folder.create() == tmp_path  # a process of the server itself


@pytest.mark.usefixtures("no_folder")
def test_without_a_temporary_folder_there_are_no_metrics(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(**_: object) -> str:
        raise OSError("read-only")

    monkeypatch.setattr("tempfile.mkdtemp", fails)
    assert run_folder.create() is None
