# SPDX-License-Identifier: Apache-2.0
"""Who may import whom inside the package, read from the source without importing it.

The planner knows no vLLM, kernels know nothing but torch and Triton, and only `ops` knows the
kernels. Imports inside functions and under TYPE_CHECKING count as well: they are knowledge too.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "knapspec_vllm"

# Parts that know no other part; everyone may import them.
LEAVES = {"config", "compat", "envs", "hardware", "metrics", "request_options"}
# Part -> parts it may import besides itself and the leaves. None = all parts.
ALLOWED: dict[str, set[str] | None] = {
    "": set(),  # knapspec_vllm/__init__.py
    "kernels": set(),
    "config": set(),
    "compat": set(),
    "envs": set(),
    "hardware": set(),
    "metrics": set(),
    "ops": {"kernels"},
    "planner": {"ops"},
    "models": set(),
    "draft": {"planner", "models", "ops"},
    "calibration": {"draft", "planner", "ops"},
    "refusals": {"planner", "models"},  # reads configs by attribute, knows no vLLM
    # The hook after warm-up is where a worker's engine meets its calibration, and the start of a
    # scheduler where it meets what relays to workers in other processes.
    "patches": {"refusals", "calibration", "draft"},
    "plugin": {"patches"},
    "request_options": set(),
    "bench": None,
    "commands": None,
    "doctor": None,
    "cli": None,
}
MAY_IMPORT_VLLM = {
    "compat",
    "models",
    "draft",
    "patches",
    "plugin",
    "bench",
    "commands",
    "doctor",
    "cli",
}
KERNEL_LIBRARIES = {"torch", "triton"}
KERNELS = "knapspec_vllm.kernels"
# Parts that know which vLLM runner calls them.
RUNNER_MODULES = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.cpu_model_runner")
MAY_KNOW_RUNNER = ("draft/proposer.py", "patches/")


def imported_modules(file: Path, module: str) -> set[str]:
    """Absolute names of everything `file` imports; `module` is its own dotted name."""
    found = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base]).rstrip(".")
            # `from package import name` may name a module: keep both readings.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[tuple[str, Path, str]]:
    """(part, file, dotted module name) of every source file."""
    result = []
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE).with_suffix("")
        names = [n for n in relative.parts if n != "__init__"]
        module = ".".join(["knapspec_vllm", *names])
        result.append((names[0] if names else "", file, module))
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        names = file.relative_to(ROOT / "kernels").with_suffix("").parts
        result.append(("kernels", file, ".".join(["knapspec_vllm.kernels", *names])))
    return result


SOURCES = [pytest.param(*s, id=str(s[1].relative_to(ROOT))) for s in sources()]


def part_of(name: str) -> str | None:
    """The part of our package a dotted name belongs to; None for other packages."""
    first, _, rest = name.partition(".")
    if first != "knapspec_vllm":
        return None
    part = rest.partition(".")[0]
    return part if part in ALLOWED else ""  # e.g. knapspec_vllm.__version__


@pytest.mark.parametrize("part, file, module", SOURCES)
def test_arrows(part, file, module):
    assert part in ALLOWED, f"{part} is a new part: say in ALLOWED what it may import"
    allowed = ALLOWED[part]
    if allowed is None:
        return
    known = {part_of(name) for name in imported_modules(file, module)} - {None, ""}
    extra = known - allowed - LEAVES - {part}
    assert not extra, f"{module} must not import {sorted(extra)}"


@pytest.mark.parametrize("part, file, module", SOURCES)
def test_vllm_is_known_to_few(part, file, module):
    roots = {name.partition(".")[0] for name in imported_modules(file, module)}
    assert "vllm" not in roots or part in MAY_IMPORT_VLLM


@pytest.mark.parametrize("part, file, module", SOURCES)
def test_runner_is_known_to_fewer(part, file, module):
    if ALLOWED.get(part) is None or str(file).startswith(
        tuple(f"{PACKAGE}/{n}" for n in MAY_KNOW_RUNNER)
    ):
        return
    runners = [n for n in imported_modules(file, module) if n.startswith(RUNNER_MODULES)]
    assert not runners


@pytest.mark.parametrize("part, file, module", [s for s in SOURCES if s.values[0] == "kernels"])
def test_kernels_use_torch_and_triton_only(part, file, module):
    if file.is_relative_to(PACKAGE):
        return  # the alias: pathlib
    names = imported_modules(file, module)
    roots = {name.partition(".")[0] for name in names if not name.startswith(KERNELS)}
    assert roots - sys.stdlib_module_names <= KERNEL_LIBRARIES


def test_relative_imports_are_resolved(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("from . import b\nfrom ..planner.types import Plan\n")
    assert imported_modules(file, "knapspec_vllm.draft.a") == {
        "knapspec_vllm.draft",
        "knapspec_vllm.draft.b",
        "knapspec_vllm.planner.types",
        "knapspec_vllm.planner.types.Plan",
    }


@pytest.mark.parametrize("part, file, module", SOURCES)
def test_file_conventions(part, file, module):
    lines = file.read_text(encoding="utf-8").splitlines()
    header = lines[1] if lines[0].startswith("#!") else lines[0]
    assert header == "# SPDX-License-Identifier: Apache-2.0"
    assert len(lines) <= 300, "one concept a file: split it"
