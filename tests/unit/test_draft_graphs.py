# SPDX-License-Identifier: Apache-2.0
"""The pool of captured steps: what is captured when, what goes, and what a state holds.

Capturing is left out: what repeats a step here is the step itself. Real steps of a real engine go
through the pool in tests/integration/test_kernel_path.py, on a GPU as CUDA graphs.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.graphs import Step, StepGraphs, refusal
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.planner.types import Mode, Plan

ROWS, BLOCK, LENGTH = 12, 4, 3
PLANS = [
    Plan(tuple(Mode.SKIP if item == skipped else Mode.FULL for item in range(4)))
    for skipped in range(4)
]


def make_engine(**changes) -> Engine:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        model_config=SimpleNamespace(enforce_eager=changes.pop("enforce_eager", False)),
        compilation_config=SimpleNamespace(cudagraph_mode=changes.pop("mode", None)),
        parallel_config=SimpleNamespace(world_size=changes.pop("world_size", 1)),
    )
    values = dict(
        vllm_config=config, view=None, target=None, attention_groups=(), layer_names=(),
        device=torch.device("cpu"), block_size=BLOCK, num_blocks=64, max_model_len=32, paged_kv=(),
    )  # fmt: skip
    return Engine(**{**values, **changes})


class Counting:
    """A source whose step proposes 100 + the position, as confident as can be."""

    def __init__(self) -> None:
        self.steps_run: list[tuple[Plan, int, list[int]]] = []

    def new_state(self, block_table: torch.Tensor, draft_length: int) -> ops.DraftState:
        return ops.DraftState.allocate(
            len(block_table), draft_length, block_table, block_size=BLOCK, max_model_len=32
        )

    @contextmanager
    def steps(self, plan: Plan, state: ops.DraftState, longest: int):
        def step() -> None:
            self.steps_run.append((plan, longest, state.slots.tolist()))
            ops.draft_advance(
                state, state.positions + 100, torch.ones(len(state.tokens)), threshold=0.0
            )

        yield step


def make_pool(capture=lambda step: step, most: int = 2) -> tuple[StepGraphs, Counting, Counter]:
    source, results = Counting(), Counter()
    return StepGraphs(source, make_engine(), LENGTH, most, results, capture), source, results


def make_rows(positions: list[int], limits: list[int]) -> DraftRows:
    count = len(positions)
    return DraftRows(
        index=list(range(count)),
        req_ids=[str(i) for i in range(count)],
        tokens=torch.arange(count) + 50,
        positions=torch.tensor(positions),
        host_positions=positions,
        limits=limits,
        # Wider than the pool's, as a runner's table may be.
        block_table=torch.arange(1, count * 9 + 1, dtype=torch.int32).view(count, 9),
    )


def test_a_step_is_captured_when_it_comes_back():
    pool, source, results = make_pool()
    assert pool.find(PLANS[0], 1) is None
    assert not pool.settled
    assert not source.steps_run
    assert pool.find(PLANS[0], 1) is not None
    assert not pool.settled
    assert len(source.steps_run) == 1
    assert pool.find(PLANS[0], 1) is not None
    assert pool.settled
    assert len(source.steps_run) == 1
    assert results == {"miss": 2, "captured": 1, "hit": 1}


@pytest.mark.parametrize(
    ("rows", "padded"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12), (12, 12)]
)
def test_rows_are_padded_within_the_largest_batch(rows: int, padded: int):
    pool, _, _ = make_pool()
    captured = pool.made(PLANS[0], rows)
    assert captured is not None
    assert len(captured.state.tokens) == padded


def test_the_warm_up_writes_nothing_and_expects_the_longest_context():
    pool, source, _ = make_pool()
    pool.made(PLANS[0], 2)
    assert source.steps_run == [(PLANS[0], 32, [-1, -1])]


def test_the_plan_used_longest_ago_goes_first():
    pool, _, results = make_pool(most=2)
    for plan in PLANS[:2]:
        pool.made(plan, 1)
    pool.find(PLANS[0], 1)
    pool.made(PLANS[2], 1)
    assert results["evicted"] == 1
    pool.find(PLANS[0], 1)
    assert pool.settled
    assert pool.find(PLANS[1], 1) is None


def test_an_evicted_plan_is_no_news_and_captures_get_rarer():
    """Two plans take turns in a pool of one."""
    pool, _, results = make_pool(most=1)
    settled = []
    for number in range(64):
        pool.find(PLANS[number % 2], 1)
        settled.append(pool.settled)
    assert results["captured"] == results["evicted"] + 1
    # 2, 4, 8, ... rounds of a plan between its captures; first rounds and captures are unsettled.
    assert 4 <= results["captured"] <= 8
    assert settled.count(False) == 2 + results["captured"]


def test_out_of_memory_keeps_what_there_is():
    captured = []

    def capture(step: Step) -> Step:
        if len(captured) == 2:
            raise torch.OutOfMemoryError("no more")
        captured.append(step)
        return step

    pool, _, results = make_pool(capture, most=4)
    assert pool.made(PLANS[0], 1)
    assert pool.made(PLANS[1], 1)
    assert pool.made(PLANS[2], 1) is None
    assert pool.find(PLANS[0], 1)
    assert pool.find(PLANS[1], 1)
    assert results == {"captured": 2, "failed": 1, "hit": 2}


def test_measurements_are_no_rounds():
    pool, _, results = make_pool()
    first, again = pool.made(PLANS[0], 1), pool.made(PLANS[0], 1)
    assert first is again
    assert results == {"captured": 1}
    pool.clear()
    assert pool.find(PLANS[0], 1) is None


def test_what_measurements_evicted_makes_captures_no_rarer():
    """Calibration times 30 steps: with 8 graphs a plan had to come 16 times to be captured."""
    pool, _, results = make_pool(most=2)
    for plan in PLANS:
        for rows in (1, 2, 4, 8):
            pool.made(plan, rows)
    assert results["evicted"] >= 8
    pool.clear()
    assert pool.find(PLANS[0], 1) is None
    assert pool.find(PLANS[0], 1) is not None


def test_a_round_drafts_for_its_rows_and_nothing_else():
    pool, _, _ = make_pool()
    captured = pool.made(PLANS[0], 3)
    assert captured is not None
    # A round of four, then one of three: the fourth row is padding again.
    for positions, limits in (([5, 6, 7, 8], [3, 3, 3, 3]), ([9, 10, 20], [3, 1, 2])):
        make_rows(positions, limits).enter(captured.state, 2)
        assert captured.state.slots.tolist()[len(positions) :] == [-1] * (4 - len(positions))
        for _ in range(2):
            captured.replay()
    assert captured.state.counts.tolist() == [2, 1, 2, 0]
    assert captured.state.drafts.tolist() == [
        [109, 110, -1], [110, -1, -1], [120, 121, -1], [-1, -1, -1]
    ]  # fmt: skip
    # Row 2 at position 20 is in the sixth of its blocks: 9 a row, numbered from 1.
    make_rows([9, 10, 20], [3, 1, 2]).enter(captured.state, 2)
    assert captured.state.slots.tolist() == [3 * 4 + 1, 12 * 4 + 2, 24 * 4, -1]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "not permitted"),
        # Triton's errors are no RuntimeErrors.
        (OutOfResources(300_000, 230_000, "shared memory"), "out of resource: shared memory"),
    ],
)
def test_a_capture_that_fails_ends_capturing_and_says_so(caplog, error, text):
    def fails(step: Step) -> Step:
        raise error

    pool, _, results = make_pool(fails)
    assert pool.find(PLANS[0], 1) is None
    assert pool.find(PLANS[0], 1) is None
    assert pool.find(PLANS[0], 1) is None
    assert pool.settled
    assert pool.made(PLANS[1], 1) is None
    assert results == {"miss": 2, "failed": 1}
    assert '"draft_graphs": 0' in caplog.text
    assert text in caplog.text


def test_who_gets_no_graphs(monkeypatch):
    monkeypatch.delenv("KNAPSPEC_KERNELS", raising=False)
    monkeypatch.setattr(ops, "uses_triton", lambda tensor: True)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    on_gpu = {"device": torch.device("cuda")}
    assert refusal(make_engine(**on_gpu), 32) is None
    assert "draft_graphs" in str(refusal(make_engine(**on_gpu), 0))
    assert "CUDA" in str(refusal(make_engine(), 32))
    assert "enforce-eager" in str(refusal(make_engine(**on_gpu, enforce_eager=True), 32))
    assert "ranks" in str(refusal(make_engine(**on_gpu, world_size=2), 32))
    no_graphs = SimpleNamespace(name="NONE")
    assert "NONE" in str(refusal(make_engine(**on_gpu, mode=no_graphs), 32))
    monkeypatch.setattr(ops, "uses_triton", lambda tensor: False)
    assert "KNAPSPEC_KERNELS" in str(refusal(make_engine(**on_gpu), 32))
