# SPDX-License-Identifier: Apache-2.0
"""`knapspec:` metrics for the process that answers /metrics, read from the workers' files.

A custom collector and not prometheus_client's own metric objects: values are another process's and
may be read by any of several API server processes, each of which shows the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knapspec_vllm.metrics.families import FAMILIES, PREFIX, Family
from knapspec_vllm.metrics.publisher import PREFIX as FILE_PREFIX

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

ENGINE_LABELS = ("model_name", "engine")


class RunFolderCollector:
    """Metrics of every engine that publishes in a run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry would else collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        engines = list(_published(self._folder))
        for family in FAMILIES:
            metric = _new(family)
            for labels, state in engines:
                own = tuple(labels[name] for name in ENGINE_LABELS)
                for values, value in family.read(state):
                    _add(metric, family, [*own, *values], value)
            if metric.samples:
                yield metric


def register(registry: CollectorRegistry, folder: Path) -> None:
    """Make `registry` show the metrics of `folder`; does nothing the second time."""
    if any(isinstance(c, RunFolderCollector) for c in list(registry._collector_to_names)):
        return
    registry.register(RunFolderCollector(folder))  # type: ignore[arg-type]


def _published(folder: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    for file in sorted(folder.glob(f"{FILE_PREFIX}*.json")):
        try:
            entry = json.loads(file.read_text())
        except (OSError, ValueError):  # its engine has just ended
            continue
        yield entry["labels"], entry["state"]


def _new(family: Family) -> Any:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    kinds = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[family.kind](
        PREFIX + family.name, family.help, labels=[*ENGINE_LABELS, *family.labels]
    )


def _add(metric: Any, family: Family, labels: list[str], value: Any) -> None:
    if family.kind != "histogram":
        metric.add_metric(labels, value)
        return
    total, buckets = 0, []
    bounds = [str(float(bound)) for bound in family.bounds] + ["+Inf"]
    for bound, count in zip(bounds, value["counts"], strict=True):
        total += count
        buckets.append((bound, total))
    metric.add_metric(labels, buckets, value["sum"])
