# SPDX-License-Identifier: Apache-2.0
"""The folder in which the processes of one server meet; made by the first that selects KnapSpec."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

from knapspec_vllm import envs

logger = logging.getLogger("vllm.knapspec")

_RAY_NAMES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
#: What this process has made.
_made: Path | None = None


def create() -> Path | None:
    """The server's run folder; its other processes, Ray's included, inherit it by environment.

    A process of its own (not one that multiprocessing started) is a server of its own, whatever
    started it. None, with a warning, where no folder can be made: then there are no metrics.
    """
    global _made
    existing = current()
    if existing is not None and (existing == _made or multiprocessing.parent_process() is not None):
        return existing
    try:
        folder = Path(tempfile.mkdtemp(prefix="knapspec-run-"))
    except OSError as error:
        logger.warning("KnapSpec shows no metrics: no temporary folder can be made (%s)", error)
        return None
    _made = folder
    os.environ[envs.RUN_FOLDER] = str(folder)
    # Ray starts workers from its own daemon, so vLLM copies what it is told to.
    names = [name for name in os.environ.get(_RAY_NAMES, "").split(",") if name]
    ours = (envs.RUN_FOLDER, envs.KERNELS, envs.ALLOW_UNTESTED_VLLM)
    wanted = [name for name in ours if name not in names]
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
