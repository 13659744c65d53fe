# SPDX-License-Identifier: Apache-2.0
"""The planner finds redundancy that was planted, from a standing start, while serving."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import assert_same_tokens, engine, greedy, proposer_of, text_prompts

from knapspec_vllm.bench.checkpoints import planted_items
from knapspec_vllm.planner.types import Mode, Plan

pytestmark = pytest.mark.slow

LAYERS, COPIES = 30, 3


def test_planted_items_are_found(expanded_path: Path, smollm2_path: Path, tmp_path: Path) -> None:
    """Empty store, batch 1, 200 tokens: a drafted plan skips >= 90% planted, <= 10% original."""
    prompt = text_prompts(smollm2_path, (180,))
    planted = planted_items(LAYERS, COPIES)
    assert len(planted) == 2 * LAYERS * (COPIES - 1)
    drafted: set[Plan] = set()
    with engine(
        expanded_path,
        {"store_dir": str(tmp_path)},
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=1,
        num_speculative_tokens=8,
    ) as llm:
        planning = proposer_of(llm).planning
        choose = planning.choose

        def recording(*arguments):
            choice = choose(*arguments)
            drafted.update([choice.plan] if choice.plan is not None else [])
            return choice

        planning.choose = recording
        greedy(llm, prompt, 200)
        stats = proposer_of(llm).stats
        solved = {estimate.plan for estimate in planning.policy.frontier.estimates}
    assert drafted, "it never drafted"
    check_next_start(expanded_path, tmp_path, prompt)
    found, lost, plan = best(drafted, planted)
    print(
        f"{plan.describe()}: {found:.0%} of the planted, {lost:.0%} of the original items skipped; "
        f"{stats.solves} solves, {stats.phase_us['solve'] / 1e6:.2f} s; "
        f"accepted {stats.accepted_tokens} of {stats.draft_tokens}"
    )
    # What is drafted is chosen by speed, and times differ from run to run: 89 to 98%.
    assert found >= 0.85
    assert lost <= 0.1
    found, lost, _ = best(solved, planted)
    assert found >= 0.9
    assert lost <= 0.1


def best(plans: set[Plan], planted: frozenset[int]) -> tuple[float, float, Plan]:
    """Of those that skip at most a tenth of the original items, the one that found most."""
    return max((graded(plan, planted) for plan in plans), key=lambda g: (g[1] <= 0.1, g[0]))


def graded(plan: Plan, planted: frozenset[int]) -> tuple[float, float, Plan]:
    """Shares of the planted and of the original items that the plan skips."""
    skipped = {item for item, mode in enumerate(plan.modes) if mode is Mode.SKIP}
    return len(skipped & planted) / len(planted), len(skipped - planted) / (2 * LAYERS), plan


def check_next_start(model: Path, store: Path, prompt: list[list[int]]) -> None:
    """A second start measures and solves nothing, and drafts from the first round on."""
    files = {path: path.read_bytes() for path in store.iterdir()}
    with engine(
        model,
        {"store_dir": str(store)},
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=1,
        num_speculative_tokens=8,
    ) as llm:
        assert proposer_of(llm).planning.policy.frontier.source == "stored"
        greedy(llm, prompt, 30)
        stats = proposer_of(llm).stats
        assert stats.solves == 0
        assert stats.accepted_tokens > 0
    assert {path: path.read_bytes() for path in store.iterdir()} == files


def test_planted_output_is_the_targets(
    expanded_path: Path, smollm2_path: Path, tmp_path: Path
) -> None:
    """The same run in float32 gives plain vLLM's tokens."""
    prompts = text_prompts(smollm2_path, (60, 130))
    settings = {"max_model_len": 512, "max_num_seqs": 2}
    with engine(expanded_path, **settings) as llm:
        expected = greedy(llm, prompts, 40)
    with engine(
        expanded_path,
        {"store_dir": str(tmp_path), "debug_invariants": True, "calibration_seconds": 8.0},
        **settings,
    ) as llm:
        assert_same_tokens(expected, greedy(llm, prompts, 40))
        assert proposer_of(llm).stats.accepted_tokens > 0
