# SPDX-License-Identifier: Apache-2.0
"""The folder in which the processes of one server meet; made by the first that selects KnapSpec."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from knapspec_vllm import envs

_RAY_NAMES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def create() -> Path:
    """The server's run folder; child processes, Ray's included, inherit it by environment."""
    existing = current()
    if existing is not None:
        return existing
    folder = Path(tempfile.mkdtemp(prefix="knapspec-run-"))
    os.environ[envs.RUN_FOLDER] = str(folder)
    # Ray starts workers from its own daemon, so vLLM copies what it is told to.
    names = [name for name in os.environ.get(_RAY_NAMES, "").split(",") if name]
    wanted = [n for n in (envs.RUN_FOLDER, envs.KERNELS) if n not in names]
    os.environ[_RAY_NAMES] = ",".join([*names, *wanted])
    atexit.register(_remove, folder, os.getpid())
    return folder


def current() -> Path | None:
    """None where no server of this machine set one, as on another node of a Ray cluster."""
    name = os.environ.get(envs.RUN_FOLDER)
    folder = Path(name) if name else None
    return folder if folder is not None and folder.is_dir() else None


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a forked child
        shutil.rmtree(folder, ignore_errors=True)
