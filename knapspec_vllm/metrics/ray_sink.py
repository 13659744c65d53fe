# SPDX-License-Identifier: Apache-2.0
"""`knapspec:` metrics among Ray's own, from workers that are Ray actors.

With Ray Serve LLM nobody answers a /metrics of vLLM's: its loggers record into ray.util.metrics,
which Ray's agent of each node exposes as `ray_...`. An actor may do the same from wherever it is
placed. Ray takes no colon in a name, counters by their increments only, and histograms only by
single observations; so a colon becomes an underscore, as in vLLM's wrappers, and a histogram is
two counters, of its observations and of their sum. A counter appears with its first increment.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from knapspec_vllm.metrics.families import ENGINE_LABELS, FAMILIES, PREFIX, Family


def in_ray() -> bool:
    """Whether this process has joined a Ray cluster; False where Ray is absent or not used."""
    joined = getattr(sys.modules.get("ray"), "is_initialized", None)
    return callable(joined) and bool(joined())


class RaySink:
    """Records into ray.util.metrics; see the module."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._metrics = metrics
        self._counters: dict[str, Any] = {}
        self._gauges: dict[str, Any] = {}
        #: What gauges show, by name and labels.
        self._shown: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
        #: Of counters, by name and label values: what has been recorded.
        self._recorded: dict[tuple[str, tuple[str, ...]], float] = {}

    def put(self, labels: Mapping[str, str], state: Mapping[str, Any]) -> None:
        engine = tuple(labels[name] for name in ENGINE_LABELS)
        before, self._shown = self._shown, {}
        for family in FAMILIES:
            for values, value in family.read(state):
                tags = (*engine, *values)
                for name, number in _numbers(family, value):
                    self._record(family, name, tags, number)
        self._end({key: tags for key, tags in before.items() if key not in self._shown})

    def close(self) -> None:
        """Ray goes on showing what was recorded last: of gauges, that there is nothing."""
        self._end(self._shown)

    def _end(self, shown: Mapping[tuple[str, tuple[str, ...]], dict[str, str]]) -> None:
        for (name, _), tags in shown.items():
            self._gauges[name].set(math.nan, tags=tags)

    def _record(self, family: Family, name: str, values: tuple[str, ...], number: float) -> None:
        keys = (*ENGINE_LABELS, *family.labels)
        tags = dict(zip(keys, values, strict=True))
        if family.kind == "gauge":
            if name not in self._gauges:
                self._gauges[name] = self._metrics.Gauge(name, family.help, keys)
            self._gauges[name].set(number, tags=tags)
            self._shown[name, values] = tags
            return
        if name not in self._counters:
            self._counters[name] = self._metrics.Counter(name, family.help, keys)
        more = number - self._recorded.get((name, values), 0.0)
        if more > 0:  # Ray refuses to add nothing
            self._counters[name].inc(more, tags=tags)
            self._recorded[name, values] = number


def _numbers(family: Family, value: Any) -> Iterator[tuple[str, float]]:
    """Names as Ray takes them, and numbers."""
    name = re.sub(r"\W", "_", PREFIX + family.name)
    if family.kind == "histogram":
        yield f"{name}_count", float(sum(value["counts"]))
        yield f"{name}_sum", float(value["sum"])
    else:
        yield name, float(value)
