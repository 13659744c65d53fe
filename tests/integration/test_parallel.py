# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks, as processes of vLLM's own and as Ray actors: the tokens of one rank.

Plans are decided on rank 0 and broadcast; ranks that ran different sublayers would hang or differ.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knapspec_vllm.bench.checkpoints import random_checkpoint

pytestmark = pytest.mark.slow

#: Prints the tokens, what was counted, and what each rank has drafted.
PROGRAM = """
import json, sys
from dataclasses import replace
from vllm import LLM, SamplingParams
from knapspec_vllm.bench.inspection import knapspec_snapshot
settings, prompts = json.loads(sys.argv[1])

if "ahead" in sys.argv[2:]:
    # Their modules name CUDA's streams as types, and workers are forked from here.
    import vllm.v1.executor.multiproc_executor, vllm.v1.worker.cpu_worker
    from ahead_on_cpu import schedule_ahead
    schedule_ahead()

def report(worker):
    # Of mismatches, at every broadcast.
    import knapspec_vllm.draft.agreement as agreement
    agreement._REPORT_EVERY = 1

def diverge(worker):
    # The second rank believes that it has drafted something else than the first.
    drafter = worker.model_runner.drafter
    if worker.rank == 1:
        planning = drafter.planning
        planning.last_choice = replace(planning.last_choice, plan=None, draft_length=0)

if settings.get("distributed_executor_backend") == "ray":
    import ray
    ray.init(num_gpus=2, num_cpus=4, include_dashboard=False)
llm = LLM(**settings)
llm.collective_rpc(report)
params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
requests = [{"prompt_token_ids": ids} for ids in prompts]
tokens = [list(o.outputs[0].token_ids) for o in llm.generate(requests, params, use_tqdm=False)]
if "diverge" in sys.argv[2:]:
    llm.collective_rpc(diverge)
    for _ in range(2):
        after = llm.generate(requests, params, use_tqdm=False)
    tokens = [list(o.outputs[0].token_ids) for o in after]
ranks = [json.loads(text) for text in llm.collective_rpc(knapspec_snapshot)]
llm.llm_engine.engine_core.shutdown()
print("RESULT", json.dumps([tokens, ranks]))
"""
PROMPTS = [[3 + (7 * i + n) % 200 for i in range(n)] for n in (9, 40, 90)]
KNAPSPEC = {
    "method": "knapspec",
    "num_speculative_tokens": 5,
    "always_draft": True,
    "calibration": "force",
    "calibration_seconds": 2.0,
}


HERE = Path(__file__).parent
RAY_ON_CPU = HERE / "ray_on_cpu"


def run(model: Path, *more: str, **settings: object) -> tuple[list[list[int]], list[dict | None]]:
    settings = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 256,
        "max_num_seqs": 4, "skip_tokenizer_init": True, **settings,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([settings, PROMPTS]), *more],
        capture_output=True, text=True, timeout=500, check=False, stdin=subprocess.DEVNULL,
        env={
            **os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{RAY_ON_CPU}:{HERE}",
            **({"VLLM_WORKER_MULTIPROC_METHOD": "fork"} if "ahead" in more else {}),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return tuple(json.loads(line.removeprefix("RESULT ")))


@pytest.fixture(scope="module")
def model() -> Path:
    return random_checkpoint("Qwen3ForCausalLM")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Plain vLLM's, with one rank."""
    return run(model)[0]


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_two_ranks_give_the_tokens_of_one(
    model: Path, expected: list[list[int]], backend: str
) -> None:
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    tokens, ranks = run(
        model, tensor_parallel_size=2, distributed_executor_backend=backend,
        speculative_config=KNAPSPEC,
    )  # fmt: skip
    assert tokens == expected
    assert agreed(ranks)["draft_tokens"] > 0
    assert [rank["tp_plan_mismatches"] for rank in ranks] == [0, 0]


def test_two_ranks_screen_their_halves(model: Path, expected: list[list[int]]) -> None:
    """Of each one's candidates the better: as many drafts are accepted as of the full head's."""
    config = {**KNAPSPEC, "plan": "skip mlp:2", "draft_length": 4}
    counted = []
    for head in ("full", "screened"):
        tokens, ranks = run(
            model, tensor_parallel_size=2, distributed_executor_backend="mp",
            speculative_config={**config, "draft_head": head},
        )  # fmt: skip
        assert tokens == expected
        assert ("head" in ranks[1]["memory_bytes"]) is (head == "screened")
        counted.append([agreed(ranks)[name] for name in ("draft_tokens", "accepted_tokens")])
    assert counted[0] == counted[1]
    assert counted[0][1] > 10


@pytest.mark.parity
def test_two_ranks_scheduled_ahead(model: Path, expected: list[list[int]]) -> None:
    """The scheduler asks workers in other processes; their answers count two steps later."""
    tokens, ranks = run(
        model, "ahead", tensor_parallel_size=2, distributed_executor_backend="mp",
        speculative_config=KNAPSPEC, async_scheduling=True,
    )  # fmt: skip
    assert tokens == expected
    stats = agreed(ranks)
    assert 0 < stats["accepted_tokens"] < stats["draft_tokens"]
    assert stats["solves"] > 0
    # Both have it from the scheduler, and times from the first.
    assert stats["measured_rounds"] > 5
    assert stats["clipped_rows"]["max_tokens"] > 0
    for part in ("step", "draft", "own"):
        assert stats["phase_us"][part] == ranks[1]["stats"]["phase_us"][part] > 0
    assert [rank["tp_plan_mismatches"] for rank in ranks] == [0, 0]


def test_a_rank_that_differs_is_counted(model: Path, expected: list[list[int]]) -> None:
    """Both ranks know of it, and they go on with what the first decides."""
    config = {**KNAPSPEC, "resolve": False, "plan": "skip mlp:2", "draft_length": None}
    tokens, ranks = run(
        model, "diverge", tensor_parallel_size=2, distributed_executor_backend="mp",
        speculative_config=config,
    )  # fmt: skip
    assert tokens == expected
    assert [rank["tp_plan_mismatches"] for rank in ranks] == [1, 1]


def agreed(ranks: list[dict | None]) -> dict:
    """What both ranks counted: the same plans over the same tokens, the same rounds declined."""
    first, second = ranks
    assert first is not None
    assert second is not None
    counted = ("draft_tokens", "accepted_tokens", "drafting_rounds", "rounds", "solves")
    for name in (*counted, "declined_rounds"):
        assert first["stats"][name] == second["stats"][name], name
    assert first["plan_text"] == second["plan_text"]
    return first["stats"]


def test_two_ranks_decline_together(model: Path, expected: list[list[int]]) -> None:
    """Rank 0 decides alone, and a decision holds for rounds in which no rank asks it.

    The four layers of the model allow no plan that gains as much as is asked for.
    """
    config = {**KNAPSPEC, "always_draft": False, "min_speedup": 1.4}
    tokens, ranks = run(
        model, tensor_parallel_size=2, distributed_executor_backend="mp",
        speculative_config=config,
    )  # fmt: skip
    assert tokens == expected
    stats = agreed(ranks)
    assert ranks[0]["layers"] == 4  # though nothing has drafted
    assert sum(stats["declined_rounds"].values()) > 10, stats
