# SPDX-License-Identifier: Apache-2.0
"""Dashboard and alerts: every metric exists, and the alerts fire when they should."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from knapspec_vllm.metrics.families import FAMILIES
from tests.monitoring import ALERTS, METRIC, MONITORING, alert_queries, dashboard_queries

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = ROOT / "configs" / "kubernetes" / "base" / "alert-rules.yaml"


def test_metrics_in_dashboard_and_alerts_exist() -> None:
    known = {name for family in FAMILIES for name in family.exposed}
    for where, query in {**dashboard_queries(), **alert_queries()}.items():
        for name in METRIC.findall(query):
            assert name.startswith("vllm:") or name in known, f"{where}: {name}"
    shown = " ".join(dashboard_queries().values())
    missing = [f.name for f in FAMILIES if not any(name in shown for name in f.exposed)]
    # A gauge that the panel computes from counters, and one that the panel derives.
    assert set(missing) <= {"estimated_speedup_ratio", "plan_predicted_speedup_ratio"}


def test_operator_has_the_same_alerts() -> None:
    rule = yaml.safe_load(OPERATOR.read_text())
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (package prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", MONITORING / "prometheus.yml"),
     ("test", "rules", ROOT / "tests" / "unit" / "alerts_test.yml")],
    ids=["config", "alerts"],
)  # fmt: skip
def test_promtool(arguments: tuple) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
