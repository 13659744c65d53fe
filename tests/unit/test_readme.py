# SPDX-License-Identifier: Apache-2.0
"""README and configs/ say what the code does."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from knapspec_vllm.config import KnapSpecConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("field", dataclasses.fields(KnapSpecConfig), ids=lambda f: f.name)
def test_settings_table(field: dataclasses.Field) -> None:
    """Every setting is listed with its default."""
    assert f"| `{field.name}` | `{json.dumps(field.default)}` |" in README


def test_named_files_and_targets_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?:tests|configs)/[\w/.-]+\.(?:py|yaml)", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


SERVE_CONFIGS = sorted(
    [*(ROOT / "configs/serve").glob("*.yaml"), *(ROOT / "configs/kubernetes").rglob("serve.yaml")]
)


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_serve_configs_parse(path: Path) -> None:
    """vLLM's own parser accepts the file, and our settings in it are known."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--config")
    arguments = parser.parse_args(["--model", "some/model", "--config", str(path)])
    assert arguments.speculative_config["method"] == "knapspec"
    KnapSpecConfig.from_mapping((arguments.additional_config or {}).get("knapspec", {}))
    assert yaml.safe_load(path.read_text())["speculative-config"] == arguments.speculative_config
