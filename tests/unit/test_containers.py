# SPDX-License-Identifier: Apache-2.0
"""docker/: images and compose files, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers_serve import check_selected, merged, parse_serve
from tests.monitoring import MONITORING

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / name for name in ("Dockerfile", "Dockerfile.cpu", "Dockerfile.ray")]


@pytest.mark.parametrize("overrides", [(), ("compose.gpu.yaml",)], ids=["cpu", "gpu"])
def test_compose(overrides: tuple[str, ...]) -> None:
    """What Docker Compose takes; what they mount exists; the server's command parses."""
    from compose_spec import PyCompose

    files = [DOCKER / name for name in ("compose.yaml", *overrides)]
    compose: dict[str, Any] = {}
    for file in files:
        PyCompose.from_yaml(file.read_text())
        compose = merged(compose, yaml.safe_load(file.read_text()))
    mounts: dict[str, Path] = {}
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                mounts[target] = (DOCKER / source).resolve()
                assert mounts[target].exists(), volume
            else:
                assert source in compose["volumes"]
    server = compose["services"]["server"]
    assert (DOCKER / ".." / server["build"]["dockerfile"]).exists()
    command = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in server["command"]]
    place = command.index("--config") + 1
    command[place] = str(mounts[command[place]])
    parsed = parse_serve(command)
    check_selected(parsed.speculative_config, parsed.additional_config)
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["server:8000"]
    home = compose["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    folder, _, name = home.rpartition("/")
    assert (mounts[folder] / name).exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert "knapspec doctor" in text  # the smoke test
    users = re.findall(r"^USER (\S+)", text, re.M)
    assert users, "must not run as root"
    assert users[-1] not in ("0", "root"), "must not run as root"
    if "vllm/vllm-openai" in text or "ray-llm" in text:
        assert "--no-deps" in text.split("FROM")[-1]  # the image's torch stays
    ignore = (DOCKER / f"{path.name}.dockerignore").read_text().split()
    for name in ("!knapspec_vllm", "!kernels", "!setup.py"):
        assert name in ignore


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_contents_make_a_wheel(path: Path, tmp_path: Path) -> None:
    """With the files that its .dockerignore lets through, which are all that it copies."""
    source = tmp_path / "src"
    source.mkdir()
    for name in (DOCKER / f"{path.name}.dockerignore").read_text().split():
        if name.startswith("!"):
            wanted, copy_to = ROOT / name[1:], source / name[1:]
            copy_to.parent.mkdir(parents=True, exist_ok=True)
            if wanted.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(wanted, copy_to, ignore=ignore, symlinks=True)
            else:
                shutil.copy(wanted, copy_to)
    script = re.search(r"python3? (\S+\.py) ", path.read_text())
    assert script is None or (source / script[1]).exists()
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--no-deps", "--wheel-dir", tmp_path / "wheels", source], check=True, timeout=300
    )
    assert len(list((tmp_path / "wheels").glob("knapspec_vllm-*.whl"))) == 1
