# SPDX-License-Identifier: Apache-2.0
"""Parts of asynchronous rounds that need no engine; tests/integration/test_async_scheduling.py has
the whole."""

from __future__ import annotations

import torch

from knapspec_vllm.draft.async_rounds import Marks, Sampled, Timing, between_us, mark
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


def test_newest_tokens_of_a_plain_step() -> None:
    ids, discarded = torch.tensor([[7], [6]], dtype=torch.int32), torch.tensor([False, True])
    with no_host_sync():
        sampled = Sampled(ids, discarded, vocabulary=100)
    assert (sampled.counts.tolist(), sampled.newest.tolist()) == ([1, 0], [7, 0])
    assert (sampled.counts.dtype, sampled.newest.dtype) == (torch.int32, torch.int32)


def test_tokens_that_are_none_do_not_count() -> None:
    """vLLM's sampler may leave ids beyond the vocabulary behind the last valid one."""
    sampled = Sampled(torch.tensor([[5, 100]], dtype=torch.int32), torch.tensor([False]), 100)
    assert sampled.counts.tolist() == [1]
    assert sampled.newest.tolist() == [5]


def test_moments_on_a_cpu() -> None:
    start = mark(torch.device("cpu"))
    assert 0 <= between_us(start, mark(torch.device("cpu"))) < 1e6


class Solve:
    time_us = 2e5


def test_a_solve_is_no_part_of_the_step_behind_it() -> None:
    """Both lie between the drafts before them and the step's tokens."""
    with_solve = Marks(1.0, 1.75, 2.0, Solve()).read()
    assert with_solve == Timing(step_us=5.5e5, draft_us=2.5e5, solve_us=2e5)
    assert Marks(1.0, 1.75, 2.0).read() == Timing(step_us=7.5e5, draft_us=2.5e5)
    # A pause before it; the clocks of host and device differ by a little.
    assert Marks(None, 1.75, 2.0, Solve()).read() == Timing(None, 2.5e5, 2e5)
    assert Marks(1.0, 1.125, 2.0, Solve()).read().step_us == 0
