# SPDX-License-Identifier: Apache-2.0
"""From counters to a /metrics page: buckets, the worker's file, the collector.

Over 300 lines because every stage between the two is held against the same page.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from knapspec_vllm.metrics import exposition, ray_sink
from knapspec_vllm.metrics.families import FAMILIES
from knapspec_vllm.metrics.histogram import Histogram
from knapspec_vllm.metrics.publisher import TOUCH_SECONDS, FileSink, Publisher, logger
from knapspec_vllm.metrics.stats import Stats, context_bucket


def stats() -> Stats:
    made = Stats()
    made.add_choice(4, True, "")
    made.drafting_rounds = 1
    made.add_choice(3, False, "no gain")
    made.add_verified(accepted=2, drafted=3, context=5000)
    made.add_verified(accepted=0, drafted=1, context=10)
    made.add_solve(200_000.0, 200_000.0)
    made.add_round(step_us=900_000.0, own_us=1e5, draft_us=5e5, solve_us=2e5)
    made.add_prediction(speedup=1.5, round_us=1e6, plain_us=3e6, time_us=2e6)
    made.clipped_rows["request"] += 2
    made.plan_changes["plan"] += 1
    return made


def state(of: Stats) -> dict:
    return {
        "stats": of.as_dict(),
        "drafting": True,
        "skipped": {"attention": 3, "mlp": 1},
        "windowed": 2,
        "layers": 30,
        "tp_plan_mismatches": 2,
        "draft_length": 4,
        "predicted_speedup": 1.5,
        "believed_acceptance": 0.9,
        "calibration": {
            "hardware": "a CPU",
            "source": "stored",
            "attention": "backend",
            "head": "screened",
            "measured_at": 1.0,
        },
        "memory_bytes": {"solver": 1000},
    }


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple], float]:
    """(name, label items without those of the engine) -> value, as a scraper reads the page."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def shown(folder: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(exposition.RunFolderCollector(folder))  # type: ignore[arg-type]
    return registry


def test_histogram_bounds_are_inclusive() -> None:
    made = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        made.observe(value)
    assert made.as_dict() == {"counts": [2, 2, 1], "sum": 14.0}


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(0, "0-1023"), (1023, "0-1023"), (1024, "1024-4095"), (65536, "65536+"), (10**7, "65536+")],
)
def test_context_buckets(tokens: int, label: str) -> None:
    assert context_bucket(tokens) == label


def test_a_page_shows_what_was_counted(tmp_path: Path) -> None:
    of = stats()
    publisher = Publisher([FileSink(tmp_path, 0)], 0, "a model", lambda: state(of))
    assert publisher.write()
    registry = shown(tmp_path)
    found = samples(registry)
    assert found["knapspec:rounds_total", ()] == 2
    assert found["knapspec:skipped_steps_total", (("reason", "no gain"),)] == 1
    assert found["knapspec:draft_tokens_total", (("context", "4096-16383"),)] == 3
    assert found["knapspec:accepted_tokens_total", (("context", "4096-16383"),)] == 2
    assert found["knapspec:accepted_tokens_total", (("context", "0-1023"),)] == 0
    assert found["knapspec:accepted_tokens_per_pos_total", (("position", "1"),)] == 1
    assert found["knapspec:draft_tokens_per_pos_total", (("position", "0"),)] == 2
    assert found["knapspec:phase_seconds_total", (("phase", "verify"),)] == pytest.approx(0.9)
    assert found["knapspec:phase_seconds_total", (("phase", "plan"),)] == pytest.approx(0.2)
    assert found["knapspec:plan_solve_seconds_bucket", (("le", "0.1"),)] == 0
    assert found["knapspec:plan_solve_seconds_bucket", (("le", "0.3"),)] == 1
    assert found["knapspec:plan_solve_seconds_count", ()] == 1
    assert found["knapspec:plan_solve_seconds_sum", ()] == pytest.approx(0.2)
    batch = (("drafting", "true"), ("le", "4.0"))
    assert found["knapspec:batch_size_bucket", batch] == 1
    assert found["knapspec:round_seconds_total", (("source", "observed"), ("what", "plain"))] == 3
    assert found["knapspec:plan_skipped_blocks", (("kind", "attention"),)] == 3
    assert found["knapspec:plan_changes_total", (("reason", "plan"),)] == 1
    assert found["knapspec:plan_changes_total", (("reason", "stop"),)] == 0
    assert found["knapspec:enabled", ()] == 1
    assert found["knapspec:tp_plan_mismatch_total", ()] == 2
    assert found["knapspec:clipped_rows_total", (("reason", "request"),)] == 2
    chosen = (("attention", "backend"), ("hardware", "a CPU"), ("head", "screened"))
    assert found["knapspec:calibration_info", (*chosen, ("source", "stored"))] == 1
    assert found["knapspec:calibration_age_seconds", ()] > 1e6
    names = {name for name, _ in found}
    for family in FAMILIES:
        if family.name != "estimated_speedup_ratio":  # needs two readings
            assert set(family.exposed) <= names, family.name


def test_several_engines_and_a_broken_file(tmp_path: Path) -> None:
    for engine in (0, 1):
        Publisher([FileSink(tmp_path, engine)], engine, "m", lambda: state(stats())).write()
    (tmp_path / "engine-2.json").write_text('{"labels"')
    registry = shown(tmp_path)
    page = generate_latest(registry).decode()
    assert 'knapspec:rounds_total{engine="0",model_name="m"} 2.0' in page
    assert 'knapspec:rounds_total{engine="1",model_name="m"} 2.0' in page
    assert 'engine="2"' not in page


def test_before_the_first_request(tmp_path: Path) -> None:
    """An engine that has not planned yet has counters and nothing else."""
    Publisher([FileSink(tmp_path, 0)], 0, "m", lambda: {"stats": Stats().as_dict()}).write()
    registry = shown(tmp_path)
    found = samples(registry)
    assert found["knapspec:rounds_total", ()] == 0
    assert ("knapspec:enabled", ()) not in found


def test_speedup_of_the_last_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, of = [100.0], Stats()
    monkeypatch.setattr("knapspec_vllm.metrics.publisher.time.monotonic", lambda: clock[0])
    sink = FileSink(tmp_path, 0)
    publisher = Publisher([sink], 0, "m", lambda: state(of))

    def speedup() -> float | None:
        publisher.write()
        return json.loads(sink.path.read_text())["state"]["recent_speedup"]

    assert speedup() is None
    of.add_prediction(1.0, 1e6, plain_us=2e6, time_us=1e6)
    clock[0] += 30
    assert speedup() == pytest.approx(2.0)
    of.add_prediction(1.0, 1e6, plain_us=1e6, time_us=1e6)
    clock[0] += 40  # the first reading is now older than a minute, the second is not
    assert speedup() == pytest.approx(1.5)
    clock[0] += 50
    assert speedup() == pytest.approx(1.0)
    clock[0] += 61
    assert speedup() is None  # nothing was measured in this minute


def test_a_failed_reading_is_not_the_last(tmp_path: Path) -> None:
    answers = iter([RuntimeError("dictionary changed size during iteration"), state(stats())])

    def read() -> dict[str, Any]:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    publisher = Publisher([FileSink(tmp_path, 0)], 0, "m", read)
    assert publisher.write()
    assert samples(shown(tmp_path)) == {}
    assert publisher.write()
    assert samples(shown(tmp_path))["knapspec:rounds_total", ()] == 2


def test_the_file_goes_with_its_engine(tmp_path: Path) -> None:
    answers = [state(stats()), None]
    sink = FileSink(tmp_path, 0)
    publisher = Publisher([sink], 0, "m", lambda: answers.pop(0))
    assert publisher.write()
    assert sink.path.exists()
    assert not publisher.write()
    assert not sink.path.exists()


def test_the_file_of_an_idle_server_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nothing changes is swept out of /tmp after days, by the youngest of its three times."""
    clock, folder = [100.0], tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr("knapspec_vllm.metrics.publisher.time.monotonic", lambda: clock[0])
    sink = FileSink(folder, 0)

    def put() -> None:
        sink.put({"engine": "0"}, {})

    put()
    for path in (sink.path, folder):
        os.utime(path, (1, 1))
    put()
    assert sink.path.stat().st_atime == folder.stat().st_mtime == 1
    clock[0] += TOUCH_SECONDS
    put()
    assert min(sink.path.stat().st_atime, folder.stat().st_mtime) > 1e9
    assert sink.path.stat().st_mtime == 1  # no newer than a younger engine's
    sink.path.unlink()  # swept all the same
    put()
    assert not sink.path.exists()
    clock[0] += TOUCH_SECONDS
    put()
    assert sink.path.exists()
    shutil.rmtree(folder)
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *more: said.append(text % more))
    for _ in range(3):
        clock[0] += TOUCH_SECONDS
        put()
    assert said == [
        f"KnapSpec could not write its metrics to {sink.path}: "
        f"[Errno 2] No such file or directory: '{sink.path.with_suffix('.tmp')}'"
    ]


def test_a_newer_engine_takes_the_place_of_an_older(tmp_path: Path) -> None:
    """Of one process, one after the other: the first must not remove or hide the second."""
    answers = [state(Stats()), None]
    sink = FileSink(tmp_path, 0)
    first = Publisher([sink], 0, "m", lambda: answers.pop(0))
    first.write()
    os.utime(sink.path, (1, 1))
    second = Publisher([FileSink(tmp_path, 0)], 0, "m", lambda: state(stats()))
    second.write()
    assert samples(shown(tmp_path))["knapspec:rounds_total", ()] == 2
    first.write()
    assert samples(shown(tmp_path))["knapspec:rounds_total", ()] == 2


def test_ray_gets_increments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray adds up what it is given; a histogram is its count and its sum."""
    metrics = pytest.importorskip("ray.util.metrics")
    given: list[tuple[str, float, dict[str, str]]] = []
    for kind, method in ((metrics.Counter, "inc"), (metrics.Gauge, "set")):
        monkeypatch.setattr(
            kind, method, lambda self, value, tags: given.append((self.info["name"], value, tags))
        )
    of, labels = stats(), {"model_name": "m", "engine": "0"}
    sink = ray_sink.RaySink()
    sink.put(labels, state(of))
    first = {(name, *sorted(set(tags.values()) - {"m", "0"})): n for name, n, tags in given}
    assert first["knapspec_rounds",] == 2
    assert first["knapspec_plan_layers",] == 30
    assert first["knapspec_draft_tokens", "4096-16383"] == 3
    assert first["knapspec_batch_size_count", "true"] == 1
    assert first["knapspec_plan_solve_seconds_sum",] == pytest.approx(0.2)
    assert all(tags["model_name"] == "m" for _, _, tags in given)
    given.clear()
    of.add_choice(4, True, "")
    idle = {**state(of), "draft_length": None}
    sink.put(labels, idle)
    ended = {name for name, n, _ in given if math.isnan(n)}
    assert ended == {"knapspec_plan_draft_length"}  # or Ray would show the last one for good
    counted = {name: n for name, n, _ in given if "knapspec_plan_" not in name}
    given.clear()
    sink.close()
    assert all(math.isnan(n) for _, n, _ in given)
    assert "knapspec_enabled" in {name for name, _, _ in given}
    assert counted["knapspec_rounds"] == 1
    assert "knapspec_draft_tokens" not in counted


def test_a_sink_that_fails_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def put(self, *_: object) -> None:
            raise RuntimeError("Ray is gone")

        def close(self) -> None: ...

    file = FileSink(tmp_path, 0)
    publisher = Publisher([Broken(), file], 0, "m", lambda: state(stats()))
    assert publisher.write()
    assert publisher.write()
    assert file.path.exists()
    assert caplog.text.count("publishes no more metrics to Broken") == 1


#: Prints what a server's own page shows: the instrumentator answers before vLLM's mounted page.
PAGE = """
import sys
from pathlib import Path
from fastapi import FastAPI
from fastapi.testclient import TestClient
from knapspec_vllm.metrics import exposition
exposition.install(Path("/nowhere"))
exposition.install(Path(sys.argv[1]))
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
app = FastAPI()
attach_router(app)
for path in ("/metrics", "/metrics/"):
    print(TestClient(app).get(path).text.count("knapspec:rounds_total{"))
"""


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_page_shows_it_with_one_and_with_several_api_servers(
    tmp_path: Path, several: bool
) -> None:
    Publisher([FileSink(tmp_path, 0)], 0, "m", lambda: state(stats())).write()
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    if several:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PAGE, str(tmp_path)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.stdout.split()[-2:] == ["1", "1"], done.stderr[-2000:]
