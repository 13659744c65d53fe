# SPDX-License-Identifier: Apache-2.0
"""The dashboard's and the alerts' queries, and a real Prometheus to evaluate them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from knapspec_vllm.bench.servers import end_with_parent, free_port

ROOT = Path(__file__).resolve().parents[1]
MONITORING = ROOT / "configs" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "knapspec.json"
ALERTS = MONITORING / "alerts.yml"
#: A metric's name in PromQL: ours, or one of vLLM's.
METRIC = re.compile(r"\b(?:knapspec|vllm):[a-zA-Z_0-9]+")
_VARIABLES = {"$__rate_interval": "20s", "$datasource": "prometheus"}


def dashboard_queries() -> dict[str, str]:
    """Panel title (and legend) -> query, with Grafana's variables set to everything."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            name = f"{panel['title']}: {target['legendFormat']}"
            assert name not in queries, name
            queries[name] = filled(target["expr"])
    for annotation in dashboard["annotations"]["list"]:
        queries[f"annotation {annotation['name']}"] = filled(annotation["expr"])
    return queries


def alert_queries() -> dict[str, str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def filled(query: str) -> str:
    """A query of the dashboard with Grafana's variables set to everything."""
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    query = re.sub(r'"\$\w+"', '".*"', query)
    assert "$" not in query, query
    return query


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query, now. Raises AssertionError for one it cannot read."""
        data = urllib.parse.urlencode({"query": expression}).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query", data, timeout=30) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        assert found["status"] == "success", found
        return found["data"]["result"]


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Scrapes `target` (host:port) every second, with the alerts of this repository."""
    executable = shutil.which("prometheus")
    assert executable is not None
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    log = (folder / "prometheus.log").open("wb")
    process = subprocess.Popen(
        [
            executable,
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=end_with_parent,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/-/ready", process)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def _wait(url: str, process: subprocess.Popen) -> None:
    for _ in range(100):
        assert process.poll() is None, "prometheus ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")
