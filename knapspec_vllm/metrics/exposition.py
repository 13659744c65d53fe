# SPDX-License-Identifier: Apache-2.0
"""`knapspec:` metrics for the process that answers /metrics, read from the workers' files.

A custom collector and not prometheus_client's own metric objects: values are another process's and
may be read by any of several API server processes, each of which shows the same. With several, or
with PROMETHEUS_MULTIPROC_DIR set, vLLM and its instrumentator answer from registries of their own
that hold nothing but prometheus_client's MultiProcessCollector: it then shows ours as well.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knapspec_vllm.metrics.families import ENGINE_LABELS, FAMILIES, PREFIX, Family
from knapspec_vllm.metrics.publisher import PREFIX as FILE_PREFIX

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class RunFolderCollector:
    """Metrics of every engine that publishes in a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry would else collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        engines = _published(self.folder)
        for family in FAMILIES:
            metric = _new(family)
            for labels, state in engines:
                own = tuple(labels[name] for name in ENGINE_LABELS)
                for values, value in family.read(state):
                    _add(metric, family, [*own, *values], value)
            if metric.samples:
                yield metric


def install(folder: Path) -> None:
    """Show the metrics of `folder` on this process's /metrics; the latest folder counts."""
    from prometheus_client import REGISTRY, multiprocess

    if _shown:
        _shown[0].folder = folder
        return
    collector = RunFolderCollector(folder)
    _shown.append(collector)
    REGISTRY.register(collector)  # type: ignore[arg-type]
    original = multiprocess.MultiProcessCollector.collect

    @functools.wraps(original)
    def collect(self: Any) -> Iterator[Metric]:
        yield from original(self)
        yield from collector.collect()

    multiprocess.MultiProcessCollector.collect = collect  # type: ignore[method-assign]


_shown: list[RunFolderCollector] = []


def _published(folder: Path) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Labels and state of every engine; of one that was started again, the newest."""
    found: dict[str, tuple[float, dict[str, str], dict[str, Any]]] = {}
    for file in folder.glob(f"{FILE_PREFIX}*.json"):
        try:
            written, entry = file.stat().st_mtime, json.loads(file.read_text())
        except (OSError, ValueError):  # its engine has just ended
            continue
        engine = entry["labels"]["engine"]
        if engine not in found or written > found[engine][0]:
            found[engine] = written, entry["labels"], entry["state"]
    return [(labels, state) for _, (_, labels, state) in sorted(found.items())]


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
