# SPDX-License-Identifier: Apache-2.0
"""Steps of the target that calibration times: as vLLM runs them, whichever graphs it would replay.

There are no graphs on a CPU. vLLM's dispatcher is made to name some, which changes what is staged
and padded, and not what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import engine, proposer_of

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.calibration import profiler
from knapspec_vllm.calibration.cells import Cell
from knapspec_vllm.draft.metadata import StepMetadata

pytestmark = pytest.mark.slow

SETTINGS = {"plan": "skip mlp:1", "draft_length": 1}
ROWS, CONTEXT = 3, 40


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    options = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 4}
    with engine(random_checkpoint("LlamaForCausalLM"), SETTINGS, **options) as llm:
        yield llm


def runner_of(llm: Any) -> Any:
    return proposer_of(llm).engine.target._runner


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[dict[str, Any]]:
    """Keyword arguments of the calls to come."""
    calls: list[dict[str, Any]] = []
    original = getattr(owner, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


@torch.inference_mode()
def states(llm: Any, tokens_per_row: int) -> torch.Tensor:
    """Final states [ROWS * tokens_per_row, d] of the step, the second time: a whole step's own K/V
    is what the launched one before it has written."""
    served = proposer_of(llm).engine
    rows = profiler.fake_rows(served, Cell(ROWS, CONTEXT), 8)
    with served.target.step(StepMetadata(served), rows, tokens_per_row) as forward:
        forward()
        return forward()[: ROWS * tokens_per_row].clone()


@pytest.mark.parametrize(
    "mode, tokens_per_row, size", [("PIECEWISE", 1, 4), ("PIECEWISE", 3, 16), ("FULL", 1, 4)]
)
def test_same_states_with_graphs_and_without(
    llm: Any, monkeypatch: pytest.MonkeyPatch, mode: str, tokens_per_row: int, size: int
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    runner, asked = runner_of(llm), []
    launched = states(llm, tokens_per_row)

    def dispatch(num_tokens: int, uniform_decode: bool = False, **more: Any) -> tuple[Any, Any]:
        asked.append((num_tokens, uniform_decode))
        if mode == "FULL":
            return CUDAGraphMode.FULL, BatchDescriptor(size, num_reqs=size, uniform=True)
        return CUDAGraphMode.PIECEWISE, BatchDescriptor(size)

    # Where some backends make every context one token long.
    builder = type(runner.attn_groups[0][0].get_metadata_builder())
    monkeypatch.setattr(
        builder, "build_for_cudagraph_capture", lambda *_: pytest.fail("as for a capture")
    )
    monkeypatch.setattr(runner.cudagraph_dispatcher, "dispatch", dispatch)
    dummies = spied(monkeypatch, runner, "_dummy_run")
    found = states(llm, tokens_per_row)
    torch.testing.assert_close(found, launched, rtol=1e-4, atol=1e-4)
    assert asked[0] == (ROWS * tokens_per_row, tokens_per_row == 1)
    assert len(dummies) == (2 if mode == "FULL" else 0)
    table = runner.input_batch.block_table[0].block_table
    assert not table.np.any(), "vLLM finds its table as it left it"
    assert not table.gpu.any()


def test_a_whole_verify_step(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, graphs = runner_of(llm), proposer_of(llm).verify_graphs
    launched = states(llm, 3)
    monkeypatch.setattr(graphs, "_rows", {3: (2, 4)})
    dummy_run = spied(monkeypatch, runner, "_dummy_run")
    torch.testing.assert_close(states(llm, 3), launched, rtol=1e-4, atol=1e-4)
    assert [call["profile_seq_lens"] for call in dummy_run] == [CONTEXT - 1 + 3] * 2
    assert runner.uniform_decode_query_len == 1


def test_a_whole_step_reads_the_rows_context(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other blocks it has other states: what it is timed on is not vLLM's null block."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    served, runner = proposer_of(llm).engine, runner_of(llm)
    whole = CUDAGraphMode.FULL, BatchDescriptor(4, num_reqs=4, uniform=True)
    monkeypatch.setattr(runner.cudagraph_dispatcher, "dispatch", lambda *_, **__: whole)
    caches = [served.view.attention_layer(i).kv_cache for i in range(served.view.num_layers)]
    found = []
    for _ in range(2):
        for cache in caches:
            cache.normal_()
        found.append(states(llm, 1))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_ranks_that_share_a_step_launch_it(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-parallel ranks would have to agree on a graph, at a time when each measures its own."""
    runner = runner_of(llm)
    monkeypatch.setattr(
        runner.cudagraph_dispatcher, "dispatch", lambda *_, **__: pytest.fail("asked")
    )
    monkeypatch.setattr(runner.vllm_config.parallel_config, "data_parallel_size", 2)
    assert proposer_of(llm).engine.target._graph(4, 1) is None
