# SPDX-License-Identifier: Apache-2.0
"""`knapspec calibrate`, here and over a Ray cluster; an engine then starts with what it stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import engine, greedy, proposer_of, text_prompts

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.calibration import profiler, startup
from knapspec_vllm.commands.fleet import merge, node_kinds
from knapspec_vllm.hardware import cpu_name
from knapspec_vllm.planner.costs import CostModel

pytestmark = pytest.mark.slow

CONFIG = """\
dtype: float32
enforce-eager: true
max-model-len: 512
max-num-seqs: 4
port: 9999
speculative-config:
  method: knapspec
  num_speculative_tokens: 4
additional-config:
  knapspec:
    calibration_seconds: 3.0
"""


def calibrate(model: Path, folder: Path, *arguments: str, **variables: str) -> list[dict]:
    config = folder / "serve.yaml"
    config.write_text(CONFIG)
    done = subprocess.run(
        [
            sys.executable, "-m", "knapspec_vllm.cli", "calibrate", str(model),
            "--serve-config", str(config), "--store", str(folder / "store"),
            "--batch", "1", "4", "--context", "64", "300", "9000", "--json", *arguments,
        ],
        capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("[\n") :])


def check(report: dict, folder: Path) -> None:
    path = Path(report["path"])
    assert path.parent == folder / "store"
    entry = json.loads(path.read_text())
    costs = CostModel.from_json(entry["costs"])
    assert costs.num_layers == 30
    assert report["plans"] == len(entry["frontier"]["estimates"]) > 3
    # Contexts beyond max_model_len are cut to what there is room for.
    shown = {(price["batch"], price["context"]) for price in report["prices"]}
    assert shown == {(1, 64), (1, 300), (1, 504), (4, 64), (4, 300), (4, 504)}
    for price in report["prices"]:
        assert 0 < price["empty_ms"] < price["draft_ms"]
        assert 0 < price["step_ms"] <= price["verify_ms"]


def test_an_engine_uses_it(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (report,) = calibrate(smollm2_path, tmp_path)
    check(report, tmp_path)
    before = Path(report["path"]).read_text()
    knapspec = {"calibration": "auto", "store_dir": str(tmp_path / "store")}
    settings = {"max_model_len": 512, "max_num_seqs": 4, "num_speculative_tokens": 4}
    said: list[str] = []
    # Not caplog: vLLM's loggers pass nothing on to the root's handlers.
    monkeypatch.setattr(startup.logger, "info", lambda text, *more: said.append(text % more))
    with engine(smollm2_path, knapspec, **settings) as llm:
        assert f"KnapSpec uses the calibration stored in {report['path']}" in said
        proposer = proposer_of(llm)
        assert proposer.calibration["source"] == "stored"
        assert proposer.planning.policy.frontier.source == "stored"
        greedy(llm, text_prompts(smollm2_path, (40,)), 8)
        assert proposer.stats.solves == 0
    assert json.loads(before)["costs"] == json.loads(Path(report["path"]).read_text())["costs"]


def test_curves_of_a_busy_machine_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_checkpoint("LlamaForCausalLM")
    knapspec = {"calibration": "auto", "store_dir": str(tmp_path)}
    settings = {"max_model_len": 512, "max_num_seqs": 2, "skip_tokenizer_init": True}
    said: list[str] = []
    monkeypatch.setattr(startup.logger, "warning", lambda text, *more: said.append(text % more))
    timed = profiler.time_us

    def busy(*arguments) -> list[float]:
        fastest = min(timed(*arguments))
        return [fastest, 3.0 * fastest, 4.0 * fastest]

    with monkeypatch.context() as patch:
        patch.setattr(profiler, "time_us", busy)
        with engine(model, knapspec, **settings) as llm:
            proposer = proposer_of(llm)
            assert proposer.calibration["source"] == "measured"
            assert "3.0 times as long" in proposer.calibration["disturbed"]
            greedy(llm, [[5 + i % 50 for i in range(100)]], 8)
            assert proposer.stats.solves == 1  # it plans all the same
    assert not list(tmp_path.iterdir())
    assert any("does not store its calibration" in line for line in said)
    with engine(model, knapspec, **settings) as llm:
        assert proposer_of(llm).calibration["disturbed"] is None
    assert len(list(tmp_path.iterdir())) == 1
    # Curves of two rows say nothing of batches of eight.
    with engine(model, knapspec, **{**settings, "max_num_seqs": 8}) as llm:
        assert proposer_of(llm).calibration["source"] == "measured"


def test_over_a_ray_cluster(smollm2_path: Path, tmp_path: Path) -> None:
    """One kind of node here; entries travel through Ray and not through a shared folder."""
    pytest.importorskip("ray")
    (report,) = calibrate(smollm2_path, tmp_path, "--ray", RAY_USAGE_STATS_ENABLED="0")
    check(report, tmp_path)


def test_nodes_of_a_cluster_are_told_apart_by_device_and_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of each kind is measured; those with fewer GPUs than the server has ranks are not."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **small})
    try:
        cluster.add_node(num_cpus=2, **small)
        cluster.add_node(num_cpus=3, **small)
        for name, gpus in (("H100", 4), ("H100", 8), ("L4", 1)):
            resources = {f"accelerator_type:{name}": 1}
            cluster.add_node(num_cpus=1, num_gpus=gpus, resources=resources, **small)
        ray.init(address=cluster.address, log_to_driver=False)
        kinds = node_kinds(ray, ranks=2)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert set(kinds) == {"H100", f"{cpu_name()}, 2 CPUs", f"{cpu_name()}, 3 CPUs"}
    assert kinds["H100"]["Resources"]["GPU"] in (4, 8)


def test_entries_of_several_nodes_go_into_one_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    merge({"h100-a.json": "1"}, store)
    assert merge({"l4-a.json": "2"}, store) == store / "l4-a.json"
    merge({"h100-a.json": "3"}, store)  # measured again
    assert {p.name: p.read_text() for p in store.iterdir()} == {
        "h100-a.json": "3",
        "l4-a.json": "2",
    }


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        ("method: ngram", "selects the method 'ngram'"),
        ("method: knapspec, draft_length: 0", "draft_length=0 leaves nothing to choose"),
        ("method: knapspec, plan: full, draft_length: 2", "draft_length=2 leaves nothing to"),
    ],
)
def test_what_there_is_nothing_to_measure_for_is_refused(
    tmp_path: Path, selected: str, message: str
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(f"speculative-config: {{{selected}, num_speculative_tokens: 3}}\n")
    done = subprocess.run(
        [sys.executable, "-m", "knapspec_vllm.cli", "calibrate", "m", "--serve-config", config],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
