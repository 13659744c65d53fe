# SPDX-License-Identifier: Apache-2.0
"""Sublayer views, cache reading and branches against vLLM's own forward on the same weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engines import engine, force, greedy, proposer_of, text_prompts

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.draft.branches import VllmBranches
from knapspec_vllm.draft.drafter import run_plan
from knapspec_vllm.draft.metadata import StepMetadata, slots_of
from knapspec_vllm.draft.references import References
from knapspec_vllm.models.view import SublayerView
from knapspec_vllm.planner.types import Plan

IDLE = {"plan": "full", "draft_length": 0}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@torch.inference_mode()
def hidden_states(eng, tokens: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """Output states [rows * q, d] of the target's own forward and of the all-FULL plan, run by
    vLLM's modules and by the parts that drafts run."""
    rows, q = len(tokens), len(tokens[0])
    per_row = -(-q // eng.block_size)
    table = torch.arange(1, 1 + rows * per_row, dtype=torch.int32).view(rows, per_row)
    positions = torch.arange(q).expand(rows, q)
    slots = slots_of(table, positions, eng.block_size).flatten()
    flat = positions.flatten()
    ids = torch.tensor(tokens).flatten()
    metadata = StepMetadata(eng)
    built = metadata.build(table, torch.full((rows,), q), slots, flat, q, tokens_per_row=q)
    with metadata.active(built, slots):
        own = eng.target.model(
            input_ids=ids.int(), positions=flat, intermediate_tensors=None, inputs_embeds=None
        ).clone()
        full = Plan.full(eng.view.num_layers)
        modules = run_plan(SublayerView(eng.view.target, fused=False), full, ids, flat)
        parts = run_plan(eng.view, full, ids, flat)
    return own, modules, parts


def check_view(llm) -> None:
    eng = proposer_of(llm).engine
    generator = random.Random(0)
    vocabulary = eng.vllm_config.model_config.get_vocab_size()
    tokens = [
        [generator.randrange(vocabulary) for _ in range(eng.block_size + 3)] for _ in range(2)
    ]
    own, modules, parts = hidden_states(eng, tokens)
    # The same modules on the same inputs in the same order: equal to the last bit.
    assert torch.equal(own, modules)
    # Fused kernels add up in another order. Through 30 layers of float32 that is 1e-5 of a state.
    error = (parts - own).norm(dim=-1) / own.norm(dim=-1)
    assert float(error.max()) < 1e-4
    assert_parts_are_fused(eng.view, own[:2])


def assert_parts_are_fused(view: SublayerView, states: torch.Tensor) -> None:
    """On a CPU no sublayer of these models goes through vLLM's Python norms or activation."""

    def refuse(self, *args):
        raise AssertionError(f"{type(self).__name__} was called")

    with pytest.MonkeyPatch.context() as patch:
        for module in (view.core.norm, view.layers[0].mlp.act_fn):
            patch.setattr(type(module), "forward", refuse)
        view.mlp(0, None, states.clone())
        view.final_hidden(states.clone(), states.clone())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_full_is_the_model_itself(architecture: str) -> None:
    model = random_checkpoint(architecture)
    with engine(model, IDLE, skip_tokenizer_init=True, max_model_len=512) as llm:
        check_view(llm)


def test_real_model(smollm2_path: Path) -> None:
    """View, cache reading and branches over SmolLM2 in float32."""
    with engine(smollm2_path, IDLE, max_model_len=1024, max_num_seqs=2) as llm:
        check_view(llm)
        check_cache_is_read_back(proposer_of(llm).engine)
        check_branches(llm, text_prompts(smollm2_path, (150, 301)))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_packed_cache_layouts(smollm2_path: Path, kv_cache_dtype: str) -> None:
    """bfloat16 caches are packed in tiles on CPUs with AMX; fp8 stores bytes."""
    settings = {"dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype, "max_model_len": 512}
    with engine(smollm2_path, IDLE, **settings) as llm:
        check_cache_is_read_back(proposer_of(llm).engine)


def check_cache_is_read_back(eng) -> None:
    """What vLLM's writer put into three scattered blocks is what CacheLayout reads."""
    module = eng.view.attention_layer(2)
    kv = eng.paged_kv[2]
    blocks = torch.tensor([5, 2, 7])
    count = 2 * eng.block_size + 9
    slots = slots_of(blocks[None].int(), torch.arange(count)[None], eng.block_size)[0]
    shape = (count, module.num_kv_heads, module.head_size)
    # Small integers: exact in every cache dtype, fp8 included.
    key, value = (torch.randint(-8, 9, shape).to(eng.dtype) for _ in range(2))
    module.impl.do_kv_cache_update(module, key, value, module.kv_cache, slots)
    read_key, read_value = kv.gather(blocks, eng.dtype)
    assert torch.equal(read_key[:count], key)
    assert torch.equal(read_value[:count], value)


@contextmanager
def references_seen(planning, look: Callable[[References | None], None]) -> Iterator[None]:
    """Show `look` the references of every round, those that engines forbidden to draft would pass
    over included."""
    choose, rests = planning.choose, planning.rests

    def spy(batch, max_draft_length, references, opted_out):
        look(references())
        return choose(batch, max_draft_length, references, opted_out)

    planning.choose, planning.rests = spy, lambda req_ids, steady: False
    try:
        yield
    finally:
        planning.choose, planning.rests = choose, rests


@torch.inference_mode()
def check_branches(llm, prompts: list[list[int]]) -> None:
    """The all-FULL branch predicts, from the cached prefix, the very tokens vLLM generated."""
    proposer = proposer_of(llm)
    seen: list[tuple[References, torch.Tensor]] = []

    def look(found: References | None) -> None:
        if found is not None:
            runner = VllmBranches(proposer.engine, proposer.geometry, found)
            states = runner.reference_states()[None].repeat(2, 1, 1)
            for layer in range(runner.num_layers):
                states, _ = runner.attention(layer, states, window=False)
                states = runner.mlp(layer, states)
            seen.append((found, runner.top1(states)))

    with references_seen(proposer.planning, look):
        outputs = greedy(llm, prompts, 20)
    sequences = {len(p): p + o for p, o in zip(prompts, outputs, strict=True)}
    compared = 0
    for found, top1 in seen:
        assert torch.equal(top1[0], top1[1])
        count = len(found.tokens) // len(found.starts)
        for row, start in enumerate(found.starts.tolist()):
            length = min(n for n in sequences if n + 20 >= start + count and start + count >= n)
            sequence = sequences[length]
            for i in range(count):
                at = start + i + 1  # the position this reference token predicts
                if length <= at < len(sequence):
                    assert int(top1[0, row * count + i]) == sequence[at]
                    compared += 1
    assert compared > 100


def test_reference_rows_hold_the_newest_tokens() -> None:
    """A lone row gives the tokens of all rows, and lists the blocks of its prefix only."""
    model = random_checkpoint("LlamaForCausalLM")
    with engine(model, IDLE, skip_tokenizer_init=True, max_model_len=512) as llm:
        proposer = proposer_of(llm)
        seen: list[References | None] = []
        prompt = [5 + i % 50 for i in range(200)]
        with references_seen(proposer.planning, seen.append):
            output = greedy(llm, [prompt], 3)[0]
        count = proposer.config.reference_tokens * proposer.config.reference_rows
        found = seen[-1]
        assert found.tokens.tolist() == (prompt + output)[203 - count : 203]
        assert found.starts.tolist() == [203 - count] == [found.max_start]
        assert found.positions.tolist() == list(range(203 - count, 203))
        assert found.block_table.shape == (1, -(-found.max_start // proposer.engine.block_size))
        force(llm, "skip mlp:1", 2)
        assert greedy(llm, [prompt], 3)[0] == output
