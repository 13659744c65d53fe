# SPDX-License-Identifier: Apache-2.0
"""How many tokens rows draft where whole verify steps are captured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.draft.runner_rows import of_scheduler
from knapspec_vllm.draft.verify_graphs import VerifyGraphs
from knapspec_vllm.metrics.stats import Stats

pytest.importorskip("vllm")


def graphs(rows: dict[int, tuple[int, ...]]) -> VerifyGraphs:
    found = VerifyGraphs(8, 32)
    found._rows = rows
    return found


def candidates(bounds: list[int], left: list[int]) -> Candidates:
    names = [str(i) for i in range(len(bounds))]
    return Candidates([], names, [], [9] * len(bounds), bounds, left)


@pytest.mark.parametrize(
    ("bounds", "left", "lengths"),
    [
        ([8, 8, 8], [99, 99, 99], [3, 3, 3]),
        ([8, 8, 8], [99, 2, 1], [3, 3, 3]),  # about to end: as many as the others
        ([8, 8, 8], [99, 2, 0], [3, 3, 0]),  # one has ended, and is in no further step
        ([8, 8, 8], [99, -1, 0], [3, 0, 0]),
        ([8, 2, 8], [99, 99, 2], [3, 2, 1]),  # one may not: pieces anyway, and nobody in vain
        ([8, 0, 8], [99, 99, 2], [3, 0, 1]),
        ([8, 0, 8], [99, 0, 2], [3, 0, 3]),  # of one that has ended it does not matter
        ([8] * 5, [99, 2, 99, 99, 99], [3, 1, 3, 3, 3]),  # more rows than captured
        ([8] * 5, [99, 2, 99, 99, 0], [3, 3, 3, 3, 0]),
        ([8, 8], [0, -2], [0, 0]),
    ],
)
def test_lengths(bounds: list[int], left: list[int], lengths: list[int]) -> None:
    assert graphs({4: (1, 2, 4)}).lengths(candidates(bounds, left), 3) == lengths


@pytest.mark.parametrize("rows", [{}, {3: (1, 2, 4)}])
def test_nobody_drafts_in_vain_without_a_graph(rows: dict[int, tuple[int, ...]]) -> None:
    assert graphs(rows).lengths(candidates([8, 8], [99, 2]), 3) == [3, 1]
    assert graphs(rows).lengths(candidates([8, 8], [99, 2]), 0) == [0, 0]


@pytest.mark.parametrize(
    ("tokens", "drafts", "result"),
    [
        ({"a": 4, "b": 4, "c": 4}, {"a": [-1]}, "whole"),
        ({"a": 4, "b": 2}, {"a": [-1]}, "pieces"),
        ({"a": 4, "b": 90}, {"a": [-1]}, "pieces"),
        ({"a": 3, "b": 3}, {"a": [-1]}, "pieces"),
        ({"a": 1, "b": 1}, {}, None),
    ],
)
def test_results(tokens: dict[str, int], drafts: dict[str, Any], result: str | None) -> None:
    step = SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens=drafts,
    )
    assert graphs({4: (1, 2, 4)}).result(step) == result
    assert graphs({}).result(step) is None


def request(resumable: bool = False, produced: int = 0, asked: int | None = None) -> Any:
    extra = None if asked is None else {"knapspec_draft_length": asked}
    return SimpleNamespace(
        request_id="a",
        num_tokens=50,
        num_output_tokens=produced,
        num_output_placeholders=0,
        max_tokens=20,
        resumable=resumable,
        sampling_params=SimpleNamespace(extra_args=extra),
    )


@pytest.mark.parametrize(
    ("given", "computed", "bound", "left", "reason"),
    [
        ({}, 50, 8, 19, None),
        ({"produced": 17}, 50, 8, 2, "max_tokens"),
        ({"produced": 17, "resumable": True}, 50, 1, 2, "max_tokens"),
        ({"produced": 20, "resumable": True}, 50, 0, -1, "max_tokens"),
        ({"asked": 2}, 50, 2, 19, "request"),
        ({}, 95, 3, 19, "max_model_len"),
        ({}, 120, 0, 19, "max_model_len"),
    ],
)
def test_rows_of_the_scheduler(
    given: dict[str, Any], computed: int, bound: int, left: int, reason: str | None
) -> None:
    engine: Any = SimpleNamespace(max_model_len=100, most_drafts=lambda rows: 8)
    stats = Stats()
    rows = of_scheduler([(request(**given), computed)], engine, 8, stats)
    assert (rows.bounds, rows.left) == ([bound], [left])
    assert dict(stats.clipped_rows) == ({} if reason is None else {reason: 1})
