# SPDX-License-Identifier: Apache-2.0
"""One server under load, as operators see it: metrics, dashboard, request options, tools.

Over 300 lines because starting that server is most of its time: everything that asks one is here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from knapspec_vllm.bench.servers import Server, running
from knapspec_vllm.commands.server_metrics import Reading, read
from tests.monitoring import METRIC, alert_queries, dashboard_queries, prometheus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-m", "knapspec_vllm.cli"]
#: Drafts always, so that every metric has something to show.
SETTINGS = {"always_draft": True, "calibration_seconds": 4.0}
NAME = "tested"
#: The worker publishes once a second.
PUBLISHED = 2.5
QUESTIONS = (
    "Name three colours.",
    "What is a prime number?",
    "Write a sentence about the sea.",
    "Why do leaves fall in autumn?",
)


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    settings = {**SETTINGS, "store_dir": str(folder / "store")}
    made = Server(
        "knapspec",
        str(smollm2_path),
        [
            "--dtype=float32",
            "--enforce-eager",
            "--max-model-len=1024",
            "--max-num-seqs=8",
            f"--served-model-name={NAME}",
            "--per-request-spec-decode-metrics=detailed",
            '--speculative-config={"method": "knapspec", "num_speculative_tokens": 4}',
            f"--additional-config={json.dumps({'knapspec': settings})}",
        ],
        folder / "server.log",
        {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    with running([made], timeout_seconds=300):
        yield made


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(server: Server, question: str, max_tokens: int = 40, **extra: object) -> int:
    """Streams an answer; returns how many tokens the server says it had."""
    chunks = client(server).chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    return [chunk.usage.completion_tokens for chunk in chunks if chunk.usage][-1]


def drafted_per_step(server: Server, question: str, **extra: object) -> list[int]:
    """How many tokens vLLM verified for an answer of 60 tokens, by its own account of each step."""
    answer = client(server).chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=60,
        extra_body={"ignore_eos": True, **extra},
    )
    metrics = (answer.model_extra or {}).get("metrics") or {}
    # Absent for a request without a verified draft.
    return (metrics.get("speculative_decoding") or {}).get("per_step_drafted") or []


def settled(server: Server) -> Reading:
    """A reading with all that has been done counted."""
    time.sleep(PUBLISHED)
    return read(server.url)


def test_counts_agree_with_clients_and_with_vllm(server: Server) -> None:
    before = settled(server)
    with ThreadPoolExecutor(6) as pool:
        # To the full length: an answer that ends inside a draft has accepted more than it shows.
        whole = {"ignore_eos": True}
        tokens = sum(pool.map(lambda i: ask(server, QUESTIONS[i % 4], **whole), range(12)))
    after = settled(server)

    def counted(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    assert counted("vllm:generation_tokens_total") == tokens
    drafted = counted("knapspec:draft_tokens_total")
    accepted = counted("knapspec:accepted_tokens_total")
    placeholders = counted("knapspec:placeholder_tokens_total")
    assert 0 < accepted <= drafted
    assert counted("vllm:spec_decode_num_draft_tokens_total") == drafted + placeholders
    assert 0 <= counted("vllm:spec_decode_num_accepted_tokens_total") - accepted <= placeholders
    assert counted("knapspec:draft_tokens_per_pos_total") == drafted
    assert counted("knapspec:accepted_tokens_per_pos_total") == accepted
    rounds = counted("knapspec:rounds_total")
    assert counted("knapspec:drafting_rounds_total") <= rounds
    assert counted("knapspec:batch_size_count") == rounds
    # Every round gives a row its accepted tokens and one more; prefill's is such a round.
    assert counted("knapspec:batch_size_sum") == tokens - accepted
    assert after.value("knapspec:plan_layers") == 30
    calibration = after.labels("knapspec:calibration_info")
    assert calibration["source"] == "measured"
    assert calibration["head"] in ("full", "screened")
    screened = after.total("knapspec:memory_bytes", kind="head") > 0
    assert screened is (calibration["head"] == "screened")
    assert after.total("knapspec:memory_bytes", kind="solver") > 1e6
    assert after.value("knapspec:estimated_speedup_ratio") > 0


def test_a_request_opts_out_or_caps_its_draft(server: Server) -> None:
    before = settled(server)
    tokens = ask(server, QUESTIONS[0], vllm_xargs={"knapspec_draft_length": 0})
    alone = settled(server)
    assert tokens > 5
    name = "knapspec:draft_tokens_total"
    assert alone.total(name) == before.total(name)
    ask(server, QUESTIONS[1], vllm_xargs={"knapspec_draft_length": 1})
    capped = settled(server)
    per_position = "knapspec:draft_tokens_per_pos_total"
    assert capped.total(per_position, position="0") > alone.total(per_position, position="0")
    assert capped.total(per_position, position="1") == alone.total(per_position, position="1")


def test_requests_of_one_batch_are_drafted_for_as_each_asks(server: Server) -> None:
    """By vLLM's own account of every verify step of every request."""
    before = settled(server)
    asked = (("salt", 0), ("iron", 1), ("wool", 2), ("milk", None))
    with ThreadPoolExecutor(len(asked)) as pool:
        found = [
            pool.submit(
                drafted_per_step, server, f"Where does {word} come from, and since when?",
                **({} if most is None else {"vllm_xargs": {"knapspec_draft_length": most}}),
            )
            for word, most in asked
        ]  # fmt: skip
        none, one, two, free = (future.result() for future in found)
    assert not any(none), none
    assert max(one) == 1
    # The planner may find one token best for all.
    assert 1 <= max(two) <= 2
    assert max(free) >= 1
    after = settled(server)
    assert after.total("knapspec:clipped_rows_total", reason="request") > before.total(
        "knapspec:clipped_rows_total", reason="request"
    )
    # Rounds that drafted had four rows: they were one batch.
    sizes = "knapspec:batch_size_bucket"
    wide = {"drafting": "true", "le": "+Inf"}, {"drafting": "true", "le": "2.0"}
    counts = [after.total(sizes, **of) - before.total(sizes, **of) for of in wide]
    assert counts[0] - counts[1] > 10


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_readmes_that_ask_a_server(server: Server) -> None:
    """Run as they stand there, but for the address and the model."""
    found = []
    for readme in ("README.md", "configs/README.md"):
        for block in re.findall(
            r"^```console\n(.*?)^```", (ROOT / readme).read_text(), re.M | re.S
        ):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("curl ")]
    assert len(found) == 4
    address = server.url.removeprefix("http://")
    for command in found:
        assert "localhost:8000" in command
        command = command.replace("localhost:8000", address).replace('"MODEL"', f'"{NAME}"')
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, command
        if "/chat/completions" in command:
            assert json.loads(done.stdout)["choices"][0]["message"]["content"]
        elif "/models" in command:
            assert json.loads(done.stdout)["data"][0]["id"] == NAME
        else:
            assert "knapspec:rounds_total" in done.stdout


def test_a_bad_option_is_refused_by_name(server: Server) -> None:
    for extra, words in (
        ({"knapspec_draft_length": -1}, "write a whole number"),
        ({"knapspec_draft_lenght": 2}, "did you mean 'knapspec_draft_length'"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client(server).chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": QUESTIONS[0]}],
                extra_body={"vllm_xargs": extra},
            )


def test_top(server: Server, tmp_path: Path) -> None:
    address = server.url.removeprefix("http://")
    done = subprocess.run(
        [*CLI, "top", address, "--once", "--json"], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["model"] == NAME
    assert facts["plan"]["layers"] == 30
    assert 0 < facts["acceptance"] <= 1
    assert facts["drafting_rounds"] > 0
    picture = tmp_path / "top.svg"
    done = subprocess.run(
        [*CLI, "top", server.url, "--once", "--picture", str(picture)],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    for words in ("speedup over plain", "attention skipped", "Acceptance", "Why not", NAME):
        assert words in done.stdout, done.stdout
    assert picture.read_text().startswith("<svg")


def test_top_follows(server: Server) -> None:
    """Rates between two readings; ends by itself only when told to."""
    process = subprocess.Popen(
        [*CLI, "top", server.url, "--json", "--interval", "1.5"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, server, QUESTIONS[1], 80, ignore_eos=True)
            rates = []
            while not any(rates) and len(rates) < 40:
                rates.append(json.loads(process.stdout.readline())["tokens_per_second"])
            assert answer.result() == 80
    finally:
        process.terminate()
        process.wait(20)
    assert all(rate >= 0 for rate in rates)
    assert rates[-1] > 0


def test_vllm_bench_serve_reports_its_figures(server: Server, tmp_path: Path) -> None:
    """vLLM's own client, unchanged."""
    done = subprocess.run(
        [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve",
            "--base-url", server.url, "--model", NAME, "--tokenizer", server.model,
            "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "24",
            "--num-prompts", "6", "--max-concurrency", "3", "--save-result",
            "--result-dir", str(tmp_path), "--result-filename", "bench.json",
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["completed"] == 6
    assert result["spec_decode_acceptance_length"] >= 1
    assert result["spec_decode_acceptance_rate"] > 0


def test_every_metric_of_dashboard_and_alerts_is_on_the_page(server: Server) -> None:
    ask(server, QUESTIONS[0], vllm_xargs={"knapspec_draft_length": 1})
    now = settled(server)
    used = {
        name
        for query in [*dashboard_queries().values(), *alert_queries().values()]
        for name in METRIC.findall(query)
    }
    missing = sorted(name for name in used if name not in now.samples)
    assert not missing
    assert len(used) > 25


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus")
def test_a_real_prometheus_answers_every_query(server: Server, tmp_path: Path) -> None:
    with prometheus(server.url.removeprefix("http://"), tmp_path) as found:
        for number in range(4):
            ask(server, QUESTIONS[number])
            time.sleep(1.5)
        empty = [name for name, query in dashboard_queries().items() if not found.query(query)]
        # Acceptance of a few short answers may be anything; all else is as it should be.
        alerts = {name for name, query in alert_queries().items() if found.query(query)}
        targets = found.query("up == 1")
    assert len(targets) == 1
    # Drafting whatever it costs, on a busy machine, for seconds: these may be true for a moment.
    momentary = {"AcceptsEverything", "SlowerThanPlain", "PredictionsWrong"}
    assert alerts <= {f"KnapSpec{name}" for name in momentary}, alerts
    # Nothing of these happens in a short quiet run: solves, rows that opted out meanwhile.
    assert set(empty) <= {"A solve: mean", "annotation plan changes"}, empty


def test_calibration_is_announced(server: Server) -> None:
    log = server.log_text()
    assert "KnapSpec measured" in log
    assert "KnapSpec stored its calibration in" in log
