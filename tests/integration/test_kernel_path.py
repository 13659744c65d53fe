# SPDX-License-Identifier: Apache-2.0
"""The running engine drafts and solves with the Triton kernels, over vLLM's real cache and tables.

Small models through vLLM, kernels interpreted where there is no GPU. That the output is plain
vLLM's proves the block tables, slots and layouts right; the counters prove that the kernels ran.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import assert_same_tokens, engine, greedy, proposer_of

from knapspec_vllm import envs, ops
from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.calibration import startup
from knapspec_vllm.calibration.profiler import warm_up_solver
from knapspec_vllm.draft import solving
from knapspec_vllm.draft.branches import VllmBranches
from knapspec_vllm.draft.graphs import Capture, CudaCapture, StepGraphs
from knapspec_vllm.draft.references import References
from knapspec_vllm.draft.solve_graphs import Shape, SolveGraphs
from knapspec_vllm.planner.solver import ItemWeights, SolverSettings, start_solve
from tests.helpers_no_sync import no_host_sync

pytestmark = pytest.mark.kernels

KERNELS = {
    "paged_decode_attention",
    "draft_start",
    "draft_advance",
    "greedy_confidence",
}
SOLVER_KERNELS = {"branch_attention", "dp_relax", "gather_branches"}
PROMPTS = [[5 + i % 50 for i in range(70)], [9 + i % 31 for i in range(23)]]


def repeat(device: torch.device) -> Capture:
    """Repeats a step by running it again, where there are no graphs."""
    return lambda step: step


CAPTURES = [repeat, CudaCapture]
#: Settings of what drafts with kernels, FULL and WINDOW.
DRAFTING = {
    "plan": "skip mlp:1; window attn:1",
    "draft_length": 2,
    "draft_attention": "kernel",
    "window_tokens": 16,
    "sink_tokens": 16,
    "debug_invariants": True,
}
ENGINE = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 2}


@pytest.fixture
def triton_ops(monkeypatch):
    monkeypatch.setenv(envs.KERNELS, "auto")
    ops.launches.clear()
    return monkeypatch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts(triton_ops, dtype: str) -> None:
    """FULL and WINDOW attention of the draft; bfloat16 caches are packed in tiles on some CPUs."""
    model = random_checkpoint("LlamaForCausalLM")
    with engine(model, dtype=dtype, **ENGINE) as llm:
        expected = greedy(llm, PROMPTS, 8)
    with engine(model, DRAFTING, dtype=dtype, **ENGINE) as llm:
        clock, told = proposer_of(llm)._clock, []
        ended = clock.ended
        clock.ended = lambda *args: (told.append(args[4]), ended(*args))
        found = greedy(llm, PROMPTS, 8)
        stats = proposer_of(llm).stats
        layers = proposer_of(llm).engine.view.num_layers
    if dtype == "float32":
        assert_same_tokens(expected, found)
    assert stats.draft_tokens > 8
    assert {op for op, kind in ops.launches if kind == "triton"} >= KERNELS
    assert not [op for op, kind in ops.launches if kind == "eager"]
    # One attention launch for every layer that the plan does not skip, in every forward.
    forwards = ops.launches["greedy_confidence", "triton"]
    assert sum(told) == forwards  # what a round's draft time is booked on
    assert ops.launches["paged_decode_attention", "triton"] == layers * forwards


@pytest.mark.parametrize("capture", CAPTURES)
def test_drafts_with_captured_steps(triton_ops, capture) -> None:
    """Padded batches whose rows come and go, over two plans' worth of states at fixed addresses."""
    if capture is CudaCapture and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = random_checkpoint("LlamaForCausalLM")
    prompts = [*PROMPTS, [3 + i % 17 for i in range(40)]]
    options = {**ENGINE, "max_num_seqs": 4, "dtype": "float32"}
    with engine(model, **options) as llm:
        expected = [*greedy(llm, prompts, 9), *greedy(llm, PROMPTS[:1], 9)]
    with engine(model, DRAFTING, **options) as llm:
        proposer = proposer_of(llm)
        length, graphs = proposer.num_speculative_tokens, proposer.stats.graphs
        proposer.drafter.graphs = StepGraphs(
            proposer.drafter, proposer.engine, length, 2, graphs, capture(proposer.engine.device)
        )
        found = [*greedy(llm, prompts, 9), *greedy(llm, PROMPTS[:1], 9)]
    assert_same_tokens(expected, found)
    # Three rows in a step of four, and one: a miss each, captured with the second.
    assert graphs["captured"] == 2
    assert graphs["hit"] > 2
    assert not graphs["failed"]


def test_warms_the_solver_up(triton_ops) -> None:
    """Every kernel of a solve is launched before the server takes requests."""
    settings = {"plan": "skip mlp:1", "draft_length": 1, "window_tokens": 16, "sink_tokens": 16}
    with engine(random_checkpoint("LlamaForCausalLM"), settings, **ENGINE) as llm:
        proposer = proposer_of(llm)
        ops.launches.clear()
        warm_up_solver(proposer.engine, proposer.geometry, SolverSettings(live_branches=6), 4, 2)
        assert {op for op, ran in ops.launches if ran == "triton"} >= SOLVER_KERNELS
        assert not [op for op, ran in ops.launches if ran == "eager"]


@pytest.mark.parametrize("capture", CAPTURES)
def test_captured_solves(triton_ops, capture) -> None:
    """They find what solves launch by launch find: other tokens, rows, contexts and prices too."""
    if capture is CudaCapture and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings = {"plan": "skip mlp:1", "draft_length": 1, "window_tokens": 16, "sink_tokens": 16}
    options = {**ENGINE, "max_model_len": 2048}  # long enough for split prefixes
    with engine(random_checkpoint("LlamaForCausalLM"), settings, **options) as llm:
        proposer = proposer_of(llm)
        served, geometry = proposer.engine, proposer.geometry
        solver = SolverSettings(live_branches=6)
        graphs = SolveGraphs(served, geometry, solver, capture(served.device))
        graphs.prepare([Shape(2, 4, True), Shape(2, 4, False), Shape(1, 8, True)])
        assert len(graphs) == 3
        for rows, context, window_us in ((2, 60, 0.5), (2, 90, 1.0), (1, 1500, 0.3), (2, 33, 0.5)):
            given = fake_references(served, rows, 8 // rows, context)
            weights = ItemWeights(1.0, window_us, 2.0)
            found = graphs.start(given, weights)
            assert found is not None
            with torch.inference_mode():
                want = start_solve(VllmBranches(served, geometry, given), weights, solver)
            # Cosines differ in their last bits: splits are those of the longest context.
            plans = [(estimate.plan, estimate.hits) for estimate in want.result()]
            assert plans == [(estimate.plan, estimate.hits) for estimate in found.result()]
            assert plans
        assert graphs.start(fake_references(served, 1, 3, 60), weights) is None, "another shape"


def fake_references(served, rows: int, tokens: int, context: int) -> References:
    """Random tokens at the end of `context` tokens, over blocks that hold what they hold."""
    device, width = served.device, -(-context // served.block_size)
    return References(
        tokens=torch.randint(5, 400, (rows * tokens,), device=device),
        starts=torch.full((rows,), context - tokens, device=device),
        block_table=torch.arange(1, rows * width + 1, dtype=torch.int32, device=device).view(
            rows, width
        ),
        max_start=context - tokens,
    )


@pytest.mark.parametrize("works", [True, False])
def test_the_solver_is_prepared_at_start(triton_ops, caplog, works: bool) -> None:
    """Captured for one row and for several; launch by launch where it cannot be."""

    def capture(device):
        def refuses(step):
            raise RuntimeError("not now")

        return repeat(device) if works else refuses

    triton_ops.setattr(startup, "CudaCapture", capture)
    settings = {"calibration": "off", "live_branches": 6, "window_tokens": 16, "sink_tokens": 16}
    with engine(random_checkpoint("LlamaForCausalLM"), settings, **ENGINE) as llm:
        proposer = proposer_of(llm)
        proposer.drafter.graphs = object()  # as on a GPU: captures are allowed
        graphs = startup._prepared_solver(proposer)
    if works:
        assert graphs is not None
        assert len(graphs) == 4
    else:
        assert graphs is None
        assert "could not prepare its solver (not now)" in caplog.text


def test_solves(triton_ops, tmp_path: Path) -> None:
    """The solver over the served model finds with kernels what it finds with the eager twins.

    And it never waits for values on the way.
    """
    model = random_checkpoint("LlamaForCausalLM")
    settings = {
        "store_dir": str(tmp_path),  # the second engine takes the first one's measured costs
        "calibration_seconds": 0.5,
        "reference_tokens": 4,
        "live_branches": 6,
        "window_tokens": 16,
        "sink_tokens": 16,
    }
    frontiers = []

    def guarded(*args):
        with no_host_sync():
            return start_solve(*args)

    for kind in ("eager", "triton"):
        triton_ops.setenv(envs.KERNELS, "eager" if kind == "eager" else "auto")
        # The interpreter reads tensors itself, so only the twins can be watched.
        triton_ops.setattr(solving, "start_solve", guarded if kind == "eager" else start_solve)
        with engine(model, settings, num_speculative_tokens=1, **ENGINE) as llm:
            proposer_of(llm).planning.request_solve()
            ops.launches.clear()
            greedy(llm, PROMPTS, 4)
            assert proposer_of(llm).stats.solves == 1
            assert {op for op, ran in ops.launches if ran == kind} >= SOLVER_KERNELS
            assert {ran for _, ran in ops.launches} == {kind}
            frontiers.append(proposer_of(llm).planning.policy.frontier)
    assert frontiers[0].estimates
    assert [e.plan for e in frontiers[0].estimates] == [e.plan for e in frontiers[1].estimates]
    assert [e.hits for e in frontiers[0].estimates] == [e.hits for e in frontiers[1].estimates]
