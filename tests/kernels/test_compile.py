# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for the GPUs it is written for, on any machine with Triton's compiler.

In a process of its own: here the interpreter may be on, and it misses what the compiler refuses.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

FOLDER = Path(__file__).parent
KERNELS = FOLDER.parents[1] / "kernels"

MOST_VARIANTS = {
    # By tokens of the solver's reference rows, which hardly change while a server runs.
    "_dp_relax_kernel": 5,
}
"""Binaries a kernel may need as batches change; 2 if not listed: with splits and without."""


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Said outright because Triton 3.9 warns and 3.10 changes its mind.
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


def compile_for_gpu(tmp_path: Path, *arguments: str) -> dict:
    report = tmp_path / "report.json"
    done = python(str(FOLDER / "compile_for_gpu.py"), "--json", str(report), *arguments)
    assert done.returncode == 0, done.stderr[-8000:]
    print(done.stdout)
    return json.loads(report.read_text())


def all_kernels() -> set[str]:
    """Names of the functions in kernels/ that are launched, not called by other kernels."""
    return {
        node.name
        for file in KERNELS.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def test_every_kernel_compiles(tmp_path):
    """It also fits into shared memory and registers, and none is left out."""
    kernels = compile_for_gpu(tmp_path, "--quick", "--arch", "90")["kernels"]
    assert {row["kernel"] for row in kernels} == all_kernels()


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_every_case_compiles(arch, tmp_path):
    """Head sizes, dtypes, cache layouts and models; also on an A100 and an L4."""
    kernels = compile_for_gpu(tmp_path, "--arch", str(arch))["kernels"]
    assert {row["kernel"] for row in kernels} == all_kernels()


def test_batch_sizes_share_binaries(tmp_path):
    """A request must not wait for a compiler because the batch has just grown by one row."""
    for case, kernels in compile_for_gpu(tmp_path, "--variants")["variants"].items():
        for kernel, count in kernels.items():
            assert count <= MOST_VARIANTS.get(kernel, 2), f"{case}: {kernel} has {count} binaries"


BROKEN = """
import sys
sys.path.insert(0, {folder!r})
import compile_for_gpu
import torch, triton, triton.language as tl

@triton.jit
def grows(x_ptr, n):
    total = 0
    for i in range(n):
        total += tl.load(x_ptr + i).to(tl.int64)
    tl.store(x_ptr, total)

@triton.jit
def shares(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    tl.store(x_ptr + i[:, None] * N + i[None, :], tl.dot(x, x))

cases = {{
    "grows": lambda: grows[(1,)](torch.empty(9, dtype=torch.int32), 9),
    "shares": lambda: shares[(1,)](torch.empty(64 * 64, dtype=torch.bfloat16), 64),
}}
compile_for_gpu.SHARED_LIMIT[90] = 4096  # rather than a kernel that takes minutes to compile
_, errors = compile_for_gpu.compile_cases(cases, 90)
assert "Loop-carried variable" in errors["grows"], errors["grows"]
assert "of shared memory" in errors["shares"], errors["shares"]
"""


def test_broken_kernels_are_found(tmp_path):
    """The interpreter runs both: a type that changes in a loop, and too much shared memory."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(folder=str(FOLDER)))
    done = python(str(script))
    assert done.returncode == 0, done.stderr[-4000:]
