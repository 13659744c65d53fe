# SPDX-License-Identifier: Apache-2.0
"""Features of single requests, all in one batch: the same output with and without KnapSpec."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import engine, proposer_of
from features import assert_same_answers, run_features

pytestmark = pytest.mark.slow


@pytest.mark.parity
def test_mixed_requests(smollm2_path: Path) -> None:
    settings = {"max_model_len": 512, "max_num_seqs": 9}
    with engine(smollm2_path, **settings) as llm:
        expected = run_features(llm, smollm2_path)
    knapspec = {"plan": "skip attn:6,7 mlp:9,17", "draft_length": 4, "debug_invariants": True}
    with engine(smollm2_path, knapspec, **settings) as llm:
        got = run_features(llm, smollm2_path)
        stats = proposer_of(llm).stats
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert_same_answers(expected, got)
