# SPDX-License-Identifier: Apache-2.0
"""Verify steps as whole graphs: vLLM's own capture and padding, with the graphs left out on a CPU.

There a step that is to be captured is run, and one that is to be replayed is run again; rows are
padded and dispatched all the same. On a GPU the last test captures and replays.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import assert_same_tokens, engine, greedy, proposer_of

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.draft import verify_graphs

pytestmark = pytest.mark.slow

PROMPTS = [[5 + i % 50 for i in range(70)], [9 + i % 31 for i in range(23)], [7, 8, 9, 10]]
DRAFTING = {"plan": "skip mlp:1; window attn:1", "window_tokens": 16, "sink_tokens": 16}
ENGINE = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 6}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine(random_checkpoint("LlamaForCausalLM"), **ENGINE) as llm:
        return greedy(llm, PROMPTS, 14)


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.mark.parity
def test_padded_verify_steps(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows, then fewer, in steps of four; lengths that end requests are not captured."""
    settings = {**DRAFTING, "draft_length": 2, "debug_invariants": True}
    with engine(random_checkpoint("LlamaForCausalLM"), settings, **ENGINE) as llm:
        runner, padded = runner_of(llm), []
        monkeypatch.setattr(proposer_of(llm).verify_graphs, "_rows", {3: (1, 4)})
        build = runner._build_attention_metadata

        def spy(*args: Any, **kwargs: Any) -> Any:
            padded.append((kwargs["num_reqs"], kwargs.get("num_reqs_padded")))
            return build(*args, **kwargs)

        monkeypatch.setattr(runner, "_build_attention_metadata", spy)
        found = greedy(llm, PROMPTS, 14)
        assert proposer_of(llm).stats.accepted_tokens > 0
    assert (3, 4) in padded
    assert_same_tokens(expected, found)


def test_vllm_captures_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.attention.backend import AttentionCGSupport

    settings = {**DRAFTING, "draft_length": 2}
    with engine(
        random_checkpoint("LlamaForCausalLM"), settings, num_speculative_tokens=3, **ENGINE
    ) as llm:
        runner, graphs = runner_of(llm), proposer_of(llm).verify_graphs
        assert len(graphs) == 0, "vLLM captures nothing on a CPU"
        own = BatchDescriptor(4, num_reqs=4, uniform=True)
        builder = type(runner.attn_groups[0][0].get_metadata_builder())
        compilation = runner.vllm_config.compilation_config
        monkeypatch.setattr(builder, "get_cudagraph_support", lambda *_: AttentionCGSupport.ALWAYS)
        monkeypatch.setattr(compilation, "max_cudagraph_capture_size", 12)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
        monkeypatch.setattr(
            runner.cudagraph_dispatcher,
            "dispatch",
            lambda *_, **__: (CUDAGraphMode.FULL, own),
        )
        captured = []
        warmup_and_capture = runner._warmup_and_capture

        def spy(batch: Any, cudagraph_runtime_mode: Any, **kwargs: Any) -> None:
            captured.append((batch.num_tokens, batch.num_reqs))
            warmup_and_capture(batch, cudagraph_runtime_mode, **kwargs)

        monkeypatch.setattr(runner, "_warmup_and_capture", spy)
        runner._capture_cudagraphs([own], CUDAGraphMode.FULL)
        # vLLM's own, then ours of 2, 3 and 4 tokens a row, up to 12 tokens and 6 rows.
        assert captured == [
            (4, 4),
            *((2 * rows, rows) for rows in (6, 4, 2, 1)),
            *((3 * rows, rows) for rows in (4, 2, 1)),
            *((4 * rows, rows) for rows in (3, 2, 1)),
        ]
        assert len(graphs) == 10
        assert runner.uniform_decode_query_len == 1
        assert graphs.find(10, 5, 2) == BatchDescriptor(12, num_reqs=6, uniform=True)
        assert graphs.find(11, 5, 3) is None, "rows of several lengths"
        assert graphs.find(15, 5, 3) is None, "more rows than captured"
        assert graphs.find(10, 2, 5) is None, "longer than any draft"

        # Once more, as after a sleep; now memory ends, and it says what to do.
        left = iter([100, 100, 60, 40, 40])
        monkeypatch.setattr(verify_graphs, "_free_bytes", lambda _: next(left))
        said = []
        monkeypatch.setattr(
            verify_graphs.logger, "warning", lambda text, *a, **_: said.append(text % a)
        )
        runner._capture_cudagraphs([own], CUDAGraphMode.FULL)
        assert len(graphs) == 2
        assert graphs.memory_bytes == 60
        assert "stops at 2 graphs" in said[0]

        def fails(batch: Any, *_: Any, **__: Any) -> None:
            if batch.num_reqs == 2:
                raise RuntimeError("CUDA error: out of memory")

        monkeypatch.setattr(verify_graphs, "_free_bytes", lambda _: 100)
        monkeypatch.setattr(runner, "_warmup_and_capture", fails)
        runner._capture_cudagraphs([own], CUDAGraphMode.FULL)
        assert graphs._rows == {2: (4, 6)}
        assert "could not capture more than 2 verify steps (CUDA error" in said[1]
        assert runner.uniform_decode_query_len == 1


@pytest.mark.gpu
def test_replayed_on_a_gpu() -> None:
    """Captured by vLLM, replayed while it drafts; bfloat16, so against launch by launch."""
    model, settings = random_checkpoint("LlamaForCausalLM"), {**DRAFTING, "draft_length": 2}
    options = {**ENGINE, "enforce_eager": False, "dtype": "bfloat16"}
    with engine(model, settings, **options) as llm:
        graphs, runner = proposer_of(llm).verify_graphs, runner_of(llm)
        assert len(graphs) > 10
        assert graphs.memory_bytes > 0
        entries = runner.model.concrete_cudagraph_entries
        shapes = {(batch.num_tokens, batch.num_reqs) for batch in entries}
        assert {(3, 1), (6, 2), (12, 4)} <= shapes
        found = greedy(llm, PROMPTS, 14)
        graphs._rows.clear()
        assert_same_tokens(greedy(llm, PROMPTS, 14), found)
