# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` as a user runs it: selected, not selected, and misspelt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import engine, greedy

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.bench.servers import Server, running

SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def serve_fails(*arguments: str) -> str:
    """Output of a `vllm serve` that must stop by itself with an error."""
    result = subprocess.run(
        [*SERVE, *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"windw_tokens": 256}, "windw_tokens"),
        ({"draft_length": 9}, "draft_length"),
    ],
)
def test_wrong_settings_stop_the_server(settings: dict, sentence: str) -> None:
    """One clear sentence that names the setting, before any weights load."""
    model = random_checkpoint("LlamaForCausalLM")
    config = json.dumps({"method": "knapspec", "num_speculative_tokens": 4, **settings})
    output = serve_fails(str(model), "--speculative-config", config)
    assert sentence in output
    if "windw_tokens" in settings:
        assert "window_tokens" in output  # the nearest known name
    assert "Loading weights" not in output
    assert "Starting to load model" not in output


def test_served_over_http(smollm2_path: Path, tmp_path: Path) -> None:
    """Chat completions through the OpenAI client; vLLM's own metrics count the drafts."""
    from openai import OpenAI

    config = {"method": "knapspec", "num_speculative_tokens": 4}
    settings = {"plan": "skip mlp:12", "draft_length": 3}
    server = Server(
        "knapspec",
        str(smollm2_path),
        [
            "--dtype=float32",
            "--enforce-eager",
            "--max-model-len=512",
            "--max-num-seqs=4",
            f"--speculative-config={json.dumps(config)}",
            f"--additional-config={json.dumps({'knapspec': settings})}",
        ],
        tmp_path / "server.log",
        {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    with running([server], timeout_seconds=300):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=str(smollm2_path),
            messages=[{"role": "user", "content": "Name three colours."}],
            temperature=0,
            max_tokens=24,
        )
        metrics = server.metrics_text()
        log = server.log_text()
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 3
    counts = {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("vllm:spec_decode")
    }
    assert counts["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert (
        counts["vllm:spec_decode_num_accepted_tokens_total"]
        <= counts["vllm:spec_decode_num_draft_tokens_total"]
    )
    assert "KnapSpec plan: skips 1 of 30 MLPs" in log


def test_not_selected_changes_nothing() -> None:
    """An engine without KnapSpec has vLLM's own runner methods and no drafter."""
    model = random_checkpoint("LlamaForCausalLM")
    code = f"""
import os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
settings = dict(skip_tokenizer_init=True, max_model_len=256, enforce_eager=True, dtype="float32")
llm = LLM(model={str(model)!r}, **settings)
params = SamplingParams(temperature=0, max_tokens=8)
out = llm.generate([{{"prompt_token_ids": [5, 6, 7]}}], params)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from knapspec_vllm.patches import apply
runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
assert not hasattr(runner, "drafter")
assert not hasattr(GPUModelRunner.propose_draft_token_ids, "__wrapped__")
print("TOKENS", list(out[0].outputs[0].token_ids))
"""
    outputs = []
    for plugins in (None, ""):
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
        if plugins is not None:
            environment["VLLM_PLUGINS"] = plugins
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        outputs.append(next(x for x in result.stdout.splitlines() if x.startswith("TOKENS")))
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_tensor_parallel() -> None:
    """TP=2 on one CPU: plans are agreed between ranks, tokens equal plain TP=2's."""
    model = random_checkpoint("Qwen3ForCausalLM")
    texts = [[3 + (7 * i + n) % 200 for i in range(n)] for n in (9, 40, 90)]
    settings = {
        "tensor_parallel_size": 2,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "distributed_executor_backend": "mp",
    }
    with engine(model, **settings) as llm:
        expected = greedy(llm, texts, 24)
    knapspec = {"always_draft": True, "calibration": "force", "calibration_seconds": 2.0}
    with engine(model, knapspec, **settings) as llm:
        assert greedy(llm, texts, 24) == expected
        drafts = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts")
    assert drafts > 0
