# SPDX-License-Identifier: Apache-2.0
"""What the wheel holds, and that a checkout works without being installed."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Takes an editable install out of the picture, then looks at where things come from.
WITHOUT_EDITABLE = (
    "import sys; "
    "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that no build output lands in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, tree)
    for name in ("knapspec_vllm", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "-w", str(out), str(tree)], check=True, stdin=subprocess.DEVNULL)
    (built,) = out.glob("*.whl")
    return built


def run_python(code: str, cwd: Path, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE + code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_has_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = [n for n in names if n.endswith("top_level.txt")]
        assert archive.read(top_level).decode().split() == ["knapspec_vllm"]
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"knapspec_vllm"}


def test_wheel_has_all_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "knapspec_vllm").rglob("*.py")
        if "kernels" not in file.parts
    }
    expected |= {f"knapspec_vllm/{f.relative_to(ROOT)}" for f in (ROOT / "kernels").rglob("*.py")}
    assert expected | {"knapspec_vllm/py.typed"} <= names
    assert "knapspec_vllm/kernels/reference/branch_attention.py" in names
    # The checkout's alias points at a folder that an installation does not have.
    assert "knapspec_vllm/kernels/__init__.py" not in names


def test_wheel_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        points = configparser.ConfigParser()
        points.read_string(archive.read(name).decode())
    assert points["vllm.general_plugins"]["knapspec"] == "knapspec_vllm.plugin:register"
    assert points["console_scripts"]["knapspec"] == "knapspec_vllm.cli:main"


def test_wheel_pins_neither_torch_nor_triton(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("METADATA")]
        lines = archive.read(name).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line]
    assert all("extra ==" in r.replace("'", '"') for r in required), "importing needs nothing"
    assert not [r for r in required if r.startswith("torch")]
    assert {r.partition(";")[0].strip() for r in required if r.startswith("triton")} <= {"triton"}


# Runs an op, and says which file it came from.
TWIN = """
import torch
from knapspec_vllm import ops
ops.greedy_confidence(torch.zeros(1, 3))
print(sys.modules["knapspec_vllm.kernels.reference.greedy_confidence"].__file__)
"""


def test_installed_wheel_imports_outside_the_tree(wheel, tmp_path):
    pytest.importorskip("torch")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    found = run_python(TWIN, tmp_path, site)
    assert found == str(site / "knapspec_vllm/kernels/reference/greedy_confidence.py")


def test_checkout_imports_uninstalled():
    pytest.importorskip("torch")
    assert run_python(TWIN, ROOT) == str(ROOT / "kernels/reference/greedy_confidence.py")


def test_checkout_does_not_hide_other_kernels_packages(tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("def get_kernel(): return 'the other one'\n")
    # The checkout comes first on sys.path, as it does under `python -m`.
    code = "from kernels import get_kernel; print(get_kernel())"
    assert run_python(code, ROOT, ROOT, tmp_path) == "the other one"


def test_import_of_the_package_is_light():
    code = "import knapspec_vllm; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    assert run_python(code, ROOT) == "[]"
