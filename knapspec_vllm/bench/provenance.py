# SPDX-License-Identifier: Apache-2.0
"""Where, when and with what a benchmark ran; no folder or name of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import knapspec_vllm
from knapspec_vllm.hardware import cpu_name

#: Variables that change what is measured.
VARIABLES = (
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_PLUGINS"),
    *("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"),
    *("VLLM_USE_AOT_COMPILE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("KNAPSPEC_DISABLE", "KNAPSPEC_KERNELS"),
)
_PACKAGES = ("torch", "vllm", "vllm-cpu", "triton", "arctic-inference")
# An absolute path's folders: a slash (or ~/) that no word, dot or slash precedes.
_FOLDERS = re.compile(r"(?<![\w.~/:])~?/(?=[^\s/])(?:[^\s/\"'=:,]+/)*")


def provenance() -> dict[str, Any]:
    """Of this process. The engines report their own device, see `inspection`."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_version(),
        "command": without_folders(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "device": device_name(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": versions(),
        "environment": without_folders(
            {name: os.environ[name] for name in VARIABLES if name in os.environ}
        ),
    }


def versions() -> dict[str, str]:
    """Read from the installed packages, which imports none of them."""
    found = {"python": platform.python_version(), "knapspec": knapspec_vllm.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_version() -> str | None:
    """Commit of the checkout this package runs from, "-dirty" with changes; None without one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def device_name() -> str:
    """The GPU that `nvidia-smi` lists first, else the CPU; makes no CUDA context."""
    return gpu_query("name") or cpu_name()


def gpu_query(field: str) -> str | None:
    """`nvidia-smi`'s answer for the first GPU; None without one."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return lines[0].strip() if lines else None


def without_folders(value: Any) -> Any:
    """The same with absolute paths cut to their last part, in nested dicts and lists as well."""
    if isinstance(value, dict):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(part) for part in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value
