# SPDX-License-Identifier: Apache-2.0
"""Ray Serve LLM, as the RayService deploys it: an OpenAI client, and what Ray's agent exposes.

The replica takes its engine's configuration from a task on a node with a GPU and runs the model in
a Ray actor, so this process, the replica and the worker are three that never share memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from knapspec_vllm.bench.servers import free_port

pytest.importorskip("ray.serve", reason="needs ray[serve]")
pytestmark = pytest.mark.slow

MODEL = "tested"
RAY_ON_CPU = Path(__file__).parent / "ray_on_cpu"
#: Arguments: port, port of the metrics, LLMConfig. Serves until its input ends.
PROGRAM = """
import json, sys
import ray
from ray import serve
from ray.serve.llm import build_openai_app
port, metrics_port, config = map(json.loads, sys.argv[1:])
ray.init(num_gpus=1, num_cpus=4, include_dashboard=False, _metrics_export_port=metrics_port)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
print("READY", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@dataclass(frozen=True)
class Served:
    client: openai.OpenAI
    metrics_url: str

    def ask(self, **extra: object) -> str:
        answer = self.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Why do leaves fall in autumn?"}],
            temperature=0,
            max_tokens=40,
            extra_body=extra,
        )
        return answer.choices[0].message.content or ""

    def totals(self, awaited: str) -> Counter[str]:
        """Of one page, all samples of a name together; waits for `awaited` to reach the agent."""
        deadline = time.monotonic() + 60
        while True:
            with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
                page = answer.read().decode()
            found: Counter[str] = Counter()
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    found[sample.name] += sample.value  # type: ignore[assignment]
            if found[awaited] > 0 or time.monotonic() > deadline:
                return found
            time.sleep(2)


def engine_kwargs(store: Path) -> dict:
    """As a user gets them."""
    settings = {"always_draft": True, "calibration_seconds": 3.0, "store_dir": str(store)}
    done = subprocess.run(
        [
            sys.executable, "-m", "knapspec_vllm.cli", "serve-args", "--format", "ray",
            "--num-speculative-tokens", "4", "--settings", json.dumps(settings),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return yaml.safe_load(done.stdout)["engine_kwargs"]


def causes(log: Path) -> str:
    """The first thing that went wrong is far above the last that Ray prints of it."""
    lines = log.read_text().splitlines()
    return "\n".join([*[line for line in lines if "Error" in line][:20], "[...]", *lines[-30:]])


@pytest.fixture(scope="module")
def served(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("ray-serve")
    config = {
        "model_loading_config": {"model_id": MODEL, "model_source": str(smollm2_path)},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        "engine_kwargs": {
            "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4,
            **engine_kwargs(folder / "store"),
        },
    }  # fmt: skip
    # vLLM leaves this in the environment of a process that ran an engine, as pytest's has by now.
    # With it, vLLM in an actor does not hand Ray's address to its engine, which starts a Ray anew.
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_WORKER_MULTIPROC_METHOD"}
    port, metrics_port = free_port(), free_port()
    log = folder / "program.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(json.dumps, (port, metrics_port, config))],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={
                **inherited, "VLLM_CPU_KVCACHE_SPACE": "1", "RAY_USAGE_STATS_ENABLED": "0",
                "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(RAY_ON_CPU),
            },
        )  # fmt: skip
    assert process.stdin is not None
    try:
        deadline = time.monotonic() + 400
        while "READY" not in log.read_text().splitlines():
            assert process.poll() is None, causes(log)
            assert time.monotonic() < deadline, causes(log)
            time.sleep(1)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=200
        )
        yield Served(client, f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_drafts_and_answers_as_without_speculation(served: Served) -> None:
    plain = served.ask(vllm_xargs={"knapspec_draft_length": 0})
    assert plain
    assert served.ask() == plain


def test_ray_exposes_the_metrics_of_the_worker(served: Served) -> None:
    served.ask()
    found = served.totals("ray_knapspec_accepted_tokens_total")
    drafted = found["ray_knapspec_draft_tokens_total"]
    assert 0 < found["ray_knapspec_accepted_tokens_total"] <= drafted
    assert found["ray_knapspec_plan_layers"] == 30
    assert found["ray_knapspec_batch_size_count_total"] > 0


def test_a_bad_option_does_not_end_the_server(served: Served) -> None:
    """Replicas load no plugin of vLLM's, so nobody refuses it."""
    plain = served.ask(vllm_xargs={"knapspec_draft_length": 0})
    assert served.ask(vllm_xargs={"knapspec_draft_length": -1}) == plain
    assert served.ask() == plain
