# SPDX-License-Identifier: Apache-2.0
"""Published planners in the solver's place: they solve in the running engine, what they find is
drafted with, and the output stays plain vLLM's."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import assert_same_tokens, engine, greedy, proposer_of

from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.planner.baselines import NAMES

PROMPTS = [[5 + i % 50 for i in range(70)], [9 + i % 31 for i in range(23)]]
ENGINE = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 2}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine(random_checkpoint("LlamaForCausalLM"), **ENGINE) as llm:
        return greedy(llm, PROMPTS, 60)


@pytest.mark.parametrize("name", NAMES)
def test_drafts_with_the_plans_of(name: str, expected: list[list[int]], tmp_path: Path) -> None:
    settings = {
        "strategy": name,
        "always_draft": True,
        "debug_invariants": True,
        "store_dir": str(tmp_path),
        "calibration_seconds": 0.5,
    }
    with engine(random_checkpoint("LlamaForCausalLM"), settings, **ENGINE) as llm:
        found = greedy(llm, PROMPTS, 60)
        proposer = proposer_of(llm)
        plans = {e.plan for e in proposer.planning.policy.frontier.estimates}
        strategy = proposer.planning.solving.strategy
        stats = proposer.stats
        chosen = proposer.planning.last_drafting_choice.plan
    assert_same_tokens(expected, found)
    assert strategy.name == name
    assert plans
    assert chosen in plans
    assert stats.draft_tokens > 20
    # The long prompt gives every strategy enough tokens at once; DEL solves again every 16 rounds.
    assert stats.solves >= (2 if name == "del" else 1)
    assert stats.phase_us["solve"] > 0
