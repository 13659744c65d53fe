# SPDX-License-Identifier: Apache-2.0
"""Greedy output of KnapSpec equals plain vLLM's, token for token, in float32.

Every KnapSpec engine here runs with `debug_invariants`: each round also checks that drafting wrote
only into slots that the next verify step recomputes.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engines import (
    LENGTHS,
    assert_same_tokens,
    check_drafted,
    engine,
    force,
    greedy,
    metric,
    proposer_of,
    text_prompts,
)

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.planner.types import Mode, Plan

MAX_TOKENS = 12
#: Bad enough to be rejected often, good enough to be accepted often: both paths run.
MIXED = "skip attn:4,11,20 mlp:7,8,15; window attn:9,10,22-25"
SETTINGS = {"plan": MIXED, "draft_length": 5, "debug_invariants": True, "window_tokens": 128}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    return text_prompts(smollm2_path)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Plain vLLM's tokens."""
    with engine(smollm2_path) as llm:
        return greedy(llm, prompts, MAX_TOKENS)


@pytest.mark.parity
def test_batches_with_prefix_caching(smollm2_path, prompts, reference) -> None:
    """40 prompts of 10 to 5,000 tokens, batches of 8, 3, 1; later ones hit the prefix cache."""
    assert len(LENGTHS) == 40
    with engine(smollm2_path, SETTINGS, enable_prefix_caching=True) as llm:
        for batch in (8, 3, 1):
            assert_same_tokens(reference, greedy(llm, prompts, MAX_TOKENS, batch))
        check_drafted(llm)
        assert metric(llm, "prefix_cache_hits") > 1000


def test_without_prefix_caching_and_planner_on(smollm2_path, prompts, reference, tmp_path) -> None:
    """The planner's own choices, made to speculate; re-planning happens while requests run."""
    settings = {
        "always_draft": True,
        "debug_invariants": True,
        "store_dir": str(tmp_path),
        "calibration_seconds": 3.0,
    }
    with engine(smollm2_path, settings, enable_prefix_caching=False) as llm:
        for batch in (8, 3, 1):
            proposer_of(llm).planning.request_solve()
            assert_same_tokens(reference, greedy(llm, prompts, MAX_TOKENS, batch))
        check_drafted(llm)
        assert proposer_of(llm).stats.solves >= 3


@pytest.mark.parity
def test_chunked_prefill(smollm2_path, prompts, reference) -> None:
    """A budget of 96 tokens a step splits prompts and mixes their chunks with drafting rows.

    Rows stop drafting at different lengths, by confidence.
    """
    few = slice(0, 38)
    settings = SETTINGS | {"confidence_threshold": 0.5}
    with engine(
        smollm2_path, settings, max_num_batched_tokens=96, enable_prefix_caching=False
    ) as llm:
        assert_same_tokens(reference[few], greedy(llm, prompts[few], MAX_TOKENS))
        check_drafted(llm)


@pytest.mark.parity
def test_preemption(smollm2_path, prompts, reference) -> None:
    """12 blocks of 128 tokens cannot hold eight rows at once: some are preempted and resumed."""
    few = [i for i, length in enumerate(LENGTHS) if 100 <= length <= 257]
    with engine(
        smollm2_path, SETTINGS, num_gpu_blocks_override=12, max_model_len=1024, block_size=128
    ) as llm:
        got = greedy(llm, [prompts[i] for i in few], MAX_TOKENS)
        assert_same_tokens([reference[i] for i in few], got)
        assert metric(llm, "num_preemptions") > 0
        check_drafted(llm)


def test_rows_reach_max_model_len(smollm2_path, prompts) -> None:
    """Rows stop at max_model_len while others go on; no draft passes the limit."""
    few = [prompts[i] for i, length in enumerate(LENGTHS) if 40 <= length <= 128]
    with engine(smollm2_path, max_model_len=144) as llm:
        expected = greedy(llm, few, 60)
    assert len({len(tokens) for tokens in expected}) > 3
    with engine(smollm2_path, SETTINGS, max_model_len=144) as llm:
        assert_same_tokens(expected, greedy(llm, few, 60))
        assert proposer_of(llm).stats.clipped_rows["max_model_len"] > 0
        check_drafted(llm)


def test_every_forced_plan(smollm2_path, prompts, reference) -> None:
    """Each attention skipped alone, all windowed, all MLPs skipped, random plans, nothing left."""
    few = [i for i, length in enumerate(LENGTHS) if length in (10, 33, 127, 128, 200, 300)]
    texts, expected = [prompts[i] for i in few], [reference[i] for i in few]
    plans = [f"skip attn:{layer}" for layer in range(30)]
    plans += ["window attn:*", "skip mlp:*", "skip attn:*", "skip attn:* mlp:*", "full"]
    generator = random.Random(0)
    for _ in range(5):
        modes = []
        for _ in range(30):
            modes += [generator.choice(list(Mode)), generator.choice([Mode.FULL, Mode.SKIP])]
        plans.append(Plan(tuple(modes)).to_text())
    with engine(smollm2_path, SETTINGS | {"window_tokens": 32, "sink_tokens": 16}) as llm:
        for number, plan in enumerate(plans):
            force(llm, plan, 1 + number % 5)
            assert_same_tokens(expected, greedy(llm, texts, MAX_TOKENS))
        check_drafted(llm)


@pytest.mark.parity
@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Mistral", "Llama"])
def test_architectures(architecture: str) -> None:
    """Random weights: KnapSpec with random plans against plain vLLM."""
    model = random_checkpoint(f"{architecture}ForCausalLM")
    generator = random.Random(1)
    texts = [[generator.randrange(3, 200) for _ in range(n)] for n in (5, 31, 32, 33, 70, 150)]
    settings = {"skip_tokenizer_init": True, "max_model_len": 512}
    with engine(model, **settings) as llm:
        expected = greedy(llm, texts, 40)
    layers = len(proposer_layers(model))
    with engine(model, SETTINGS | {"plan": "full"}, **settings) as llm:
        assert_same_tokens(expected, greedy(llm, texts, 40))
        assert proposer_of(llm).stats.accepted_tokens > 0
        for plan in ("skip attn:1", "skip mlp:1", f"skip attn:0-{layers - 1}", "window attn:*"):
            force(llm, plan, 4)
            assert_same_tokens(expected, greedy(llm, texts, 40))


def proposer_layers(model: Path) -> range:
    from transformers import AutoConfig

    return range(AutoConfig.from_pretrained(model).num_hidden_layers)
