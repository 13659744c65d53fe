# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for a GPU that need not be there: `python compile_for_gpu.py --arch 90`.

The interpreter runs kernels as NumPy and misses what the compiler refuses: types that change inside
a loop, operands that do not fit a matrix instruction, more shared memory than there is. Here a
driver without a device stands in for CUDA's, and every launch stops after ptxas. Calling a launcher
on CPU tensors thus compiles exactly what it would run on a GPU for inputs of these sizes.

Prints what each kernel takes; `--json FILE` writes it. Exit status 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before the first import of triton
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from knapspec_vllm.kernels import branch_attention
from tests.kernels.compile_cases import CASES, QUICK

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a program may have, by architecture."""
REGISTERS = 65536
"""Of one multiprocessor."""
BATCHES = (3, 16, 17, 64, 200)
"""Among which a server moves: odd, divisible by 16, small and large."""


@dataclass(frozen=True)
class Compiled:
    """One kernel of one case, as ptxas left it."""

    case: str
    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared_bytes: int
    #: Of a thread; a stack is what ptxas spilled.
    registers: int
    stack_bytes: int
    seconds: float


class NoDevice:
    """What Triton asks of a driver up to the point where it would load a binary."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(
    arch: int, launched: Callable[[JITFunction, tuple[int, ...], Any, float], None]
) -> Iterator[None]:
    """Launches only compile, for `arch`, and report kernel, grid, binary and seconds."""
    branch_attention.shared_bytes = lambda device: SHARED_LIMIT[arch]
    triton.runtime.driver.set_active(NoDevice(arch))
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        binary = original(self, *args, grid=grid, warmup=True, **kwargs)
        assert not callable(grid), f"{self.__name__}: the grid must come from host numbers"
        launched(self, tuple(grid), binary, time.perf_counter() - start)
        return binary

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def compile_cases(
    cases: dict[str, Callable[..., object]], arch: int
) -> tuple[list[Compiled], dict[str, str]]:
    """Kernels by case, and the errors of cases that did not compile."""
    found: dict[tuple[str, str], Compiled] = {}
    errors: dict[str, str] = {}
    current = ""

    def launched(kernel: JITFunction, grid: tuple[int, ...], binary: Any, seconds: float) -> None:
        assert all(size > 0 for size in grid), f"{kernel.__name__}: empty grid {grid}"
        assert all(size <= 65535 for size in grid[1:]), f"{kernel.__name__}: grid {grid}"
        key = (kernel.__name__, binary.hash)
        if key in found:
            return
        registers, stack_bytes = _usage(binary)
        found[key] = Compiled(
            current,
            kernel.__name__,
            grid,
            binary.metadata.num_warps,
            binary.metadata.shared,
            registers,
            stack_bytes,
            seconds,
        )
        problem = _too_much(found[key], arch)
        assert not problem, f"{kernel.__name__}: {problem}"

    with compiling(arch, launched):
        for current, case in cases.items():
            try:
                case()
            except Exception:
                errors[current] = traceback.format_exc(limit=-4)
    return list(found.values()), errors


def count_variants(
    cases: dict[str, Callable[..., object]], arch: int = 90
) -> dict[str, dict[str, int]]:
    """Binaries that each case needs over all BATCHES, by kernel. Nothing is compiled."""
    keys: dict[str, set[str]] = {}

    def hook(*, key: str, fn: Any, **_: Any) -> bool:
        keys.setdefault(fn.jit_function.__name__, set()).add(key)
        return True  # "do not compile"

    counts = {}
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        with compiling(arch, lambda *_: None):
            for name, case in cases.items():
                keys.clear()
                for batch in BATCHES:
                    case(batch=batch)
                counts[name] = {kernel: len(found) for kernel, found in keys.items()}
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return counts


def _usage(binary: Any) -> tuple[int, int]:
    """Registers and bytes of stack of a thread; what does not fit into registers goes there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.findall(r"(?:REG|STACK):(\d+)", told)
    return int(numbers[0]), int(numbers[1])


def _too_much(kernel: Compiled, arch: int) -> str:
    """What a multiprocessor does not have; empty if the kernel can run."""
    limit = SHARED_LIMIT[arch]
    if kernel.shared_bytes > limit:
        return f"{kernel.shared_bytes} bytes of shared memory, there are {limit}"
    if kernel.registers * kernel.warps * 32 > REGISTERS:
        return f"{kernel.registers} registers in each of {kernel.warps * 32} threads"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one case of each kernel, or few")
    parser.add_argument("--variants", action="store_true", help="count binaries over batch sizes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = {
        case.name: case.call
        for case in CASES
        if arguments.only in case.name
        and case.least_arch <= arguments.arch
        and (not arguments.quick or case.name in QUICK)
    }
    result: dict[str, Any] = {"triton": triton.__version__, "arch": arguments.arch}
    if arguments.variants:
        result["variants"] = count_variants(cases)
        print(json.dumps(result["variants"], indent=1))
        errors: dict[str, str] = {}
    else:
        found, errors = compile_cases(cases, arguments.arch)
        print(f"{'case':<38} {'kernel':<32} {'warps':>5} {'shared':>7} {'regs':>5} {'stack':>7} "
              f"{'s':>5}  grid")  # fmt: skip
        for row in found:
            print(f"{row.case:<38} {row.kernel:<32} {row.warps:>5} {row.shared_bytes:>7} "
                  f"{row.registers:>5} {row.stack_bytes:>7} {row.seconds:>5.1f}  "
                  f"{row.grid}")  # fmt: skip
        result |= {"kernels": [asdict(row) for row in found], "errors": errors}
    for name, error in errors.items():
        print(f"{name} does not compile:\n{error}", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
