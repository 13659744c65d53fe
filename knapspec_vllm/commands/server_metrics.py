# SPDX-License-Identifier: Apache-2.0
"""A running server's /metrics page as numbers, and what happened between two readings of it."""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

KNAPSPEC = "knapspec:"


class ServerUnreachableError(RuntimeError):
    """No /metrics there; the message says what to check."""


@dataclass(frozen=True)
class Reading:
    """One scrape. samples: name -> (labels, value) of every series."""

    at: float
    samples: dict[str, list[tuple[dict[str, str], float]]]

    @classmethod
    def parse(cls, text: str, at: float) -> Reading:
        from prometheus_client.parser import text_string_to_metric_families

        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return cls(at, samples)

    @property
    def has_knapspec(self) -> bool:
        return any(name.startswith(KNAPSPEC) for name in self.samples)

    def total(self, name: str, **labels: str) -> float:
        """Sum of the series with these labels; 0 without any."""
        return sum(value for _, value in self._with(name, labels))

    def value(self, name: str, **labels: str) -> float | None:
        """Mean over engines of a gauge; None where there is none."""
        values = [value for _, value in self._with(name, labels)]
        return sum(values) / len(values) if values else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums over everything but one label."""
        sums: dict[str, float] = {}
        for labels, value in self.samples.get(name, []):
            sums[labels[label]] = sums.get(labels[label], 0.0) + value
        return sums

    def labels(self, name: str) -> dict[str, str]:
        """Of the first series."""
        return next((labels for labels, _ in self.samples.get(name, [])), {})

    def _with(self, name: str, wanted: dict[str, str]) -> Iterable[tuple[dict[str, str], float]]:
        for labels, value in self.samples.get(name, []):
            if all(labels.get(key) == text for key, text in wanted.items()):
                yield labels, value


def read(url: str, timeout_seconds: float = 10.0) -> Reading:
    """Scrape a server, whether the address is its own or that of its /metrics page."""
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    address = base if base.endswith("/metrics") else f"{base}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=timeout_seconds) as answer:
            return Reading.parse(answer.read().decode(), time.monotonic())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerUnreachableError(
            f"{address} does not answer ({error}); write the server's address, such as "
            "http://127.0.0.1:8000"
        ) from error


def between(before: Reading | None, now: Reading) -> Reading:
    """Counters and histograms as what was counted since `before`; gauges as they are.

    A server that has restarted since then counts from 0.
    """
    if before is None:
        return now
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, series in now.samples.items():
        if not name.endswith(("_total", "_count", "_sum", "_bucket")):
            samples[name] = series
            continue
        earlier = {_key(labels): value for labels, value in before.samples.get(name, [])}
        samples[name] = []
        for labels, value in series:
            begun = earlier.get(_key(labels), 0.0)
            samples[name].append((labels, value - begun if value >= begun else value))
    return Reading(now.at, samples)


def _key(labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def summary(before: Reading | None, now: Reading) -> dict[str, Any]:
    """What `knapspec top` shows, JSON-ready; rates are per second, None without a second reading.

    before: an earlier reading. None: counts are since the server's start.
    """
    since = between(before, now)
    seconds = None if before is None else max(1e-9, now.at - before.at)

    def rate(name: str) -> float | None:
        return None if seconds is None else since.total(name) / seconds

    drafted = since.total("knapspec:draft_tokens_total")
    phases = since.by("knapspec:phase_seconds_total", "phase")
    by_position = {
        int(position): since.total("knapspec:accepted_tokens_per_pos_total", position=position) / n
        for position, n in since.by("knapspec:draft_tokens_per_pos_total", "position").items()
        if n
    }
    round_s = since.total("knapspec:round_seconds_total", source="observed", what="round")
    plain_s = since.total("knapspec:round_seconds_total", source="observed", what="plain")
    intervals = since.total("vllm:inter_token_latency_seconds_count")
    layers = now.value("knapspec:plan_layers")
    return {
        "model": now.labels("knapspec:enabled").get("model_name")
        or now.labels("vllm:num_requests_running").get("model_name"),
        "knapspec": now.has_knapspec,
        "engines": len(now.samples.get("knapspec:enabled", [])),
        "drafting": bool(now.value("knapspec:enabled")),
        "running": now.total("vllm:num_requests_running"),
        "waiting": now.total("vllm:num_requests_waiting"),
        "tokens_per_second": rate("vllm:generation_tokens_total"),
        "inter_token_ms": 1e3 * since.total("vllm:inter_token_latency_seconds_sum") / intervals
        if intervals
        else None,
        "speedup": plain_s / round_s if round_s else now.value("knapspec:estimated_speedup_ratio"),
        "predicted_speedup": now.value("knapspec:plan_predicted_speedup_ratio"),
        "rounds": since.total("knapspec:rounds_total"),
        "drafting_rounds": since.total("knapspec:drafting_rounds_total"),
        "declined": {
            reason: count
            for reason, count in since.by("knapspec:skipped_steps_total", "reason").items()
            if count
        },
        "plan": {
            "layers": int(layers) if layers else None,
            "skipped_attention": now.value("knapspec:plan_skipped_blocks", kind="attention"),
            "skipped_mlp": now.value("knapspec:plan_skipped_blocks", kind="mlp"),
            "windowed": now.value("knapspec:plan_window_blocks"),
            "draft_length": now.value("knapspec:plan_draft_length"),
            "changes": since.total("knapspec:plan_changes_total"),
        },
        "acceptance": since.total("knapspec:accepted_tokens_total") / drafted if drafted else None,
        "believed_acceptance": now.value("knapspec:plan_believed_acceptance"),
        "acceptance_by_position": [by_position[i] for i in sorted(by_position)],
        "phase_seconds": phases,
        "solves": since.total("knapspec:plan_solve_seconds_count"),
        "calibration": now.labels("knapspec:calibration_info"),
    }
