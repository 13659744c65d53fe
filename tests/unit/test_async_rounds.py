# SPDX-License-Identifier: Apache-2.0
"""Parts of asynchronous rounds that need no engine; tests/integration/test_async_scheduling.py has
the whole."""

from __future__ import annotations

import pytest
import torch

from knapspec_vllm.draft.async_rounds import Sampled
from knapspec_vllm.planner.corrections import Corrections
from knapspec_vllm.planner.types import Batch
from tests.helpers_no_sync import no_host_sync


def test_newest_tokens_of_a_verified_step() -> None:
    """All kept, some kept, none drafted, and a row in the middle of its prompt."""
    ids = torch.tensor([[7, 8, 9], [4, 5, -1], [3, -1, -1], [6, -1, -1]], dtype=torch.int32)
    discarded = torch.tensor([False, False, False, True])
    with no_host_sync():
        sampled = Sampled(ids, discarded, vocabulary=100)
    assert sampled.counts.tolist() == [3, 2, 1, 0]
    assert sampled.counts.dtype == torch.int32
    assert sampled.newest.tolist() == [9, 5, 3, 0]
    assert sampled.newest.dtype == torch.int32, "vLLM scatters them into its int32 input ids"


def test_tokens_that_are_none_do_not_count() -> None:
    """vLLM's sampler may leave ids beyond the vocabulary behind the last valid one."""
    sampled = Sampled(torch.tensor([[5, 100]], dtype=torch.int32), torch.tensor([False]), 100)
    assert sampled.counts.tolist() == [1]
    assert sampled.newest.tolist() == [5]


def test_a_round_timed_as_a_whole_teaches_both_its_parts() -> None:
    corrections, batch = Corrections(), Batch(2, 400)
    for _ in range(200):
        step_us, draft_us = corrections.observe_round(batch, 3, 100.0, 50.0, 300.0)
    assert step_us + draft_us == pytest.approx(300.0)
    assert corrections.factor("verify", batch) == pytest.approx(2.0, rel=0.02)
    assert corrections.factor("draft", batch) == pytest.approx(2.0, rel=0.02)
    assert corrections.factor("plain", batch) == 1.0, "it verified"


def test_a_plain_round_teaches_plain_steps_alone() -> None:
    corrections, batch = Corrections(), Batch(2, 400)
    for _ in range(200):
        assert corrections.observe_round(batch, 0, 100.0, 0.0, 150.0) == (150.0, 0.0)
    assert corrections.factor("plain", batch) == pytest.approx(1.5, rel=0.02)
    assert corrections.factor("draft", batch) == 1.0
