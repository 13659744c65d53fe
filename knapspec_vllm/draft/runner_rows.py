# SPDX-License-Identifier: Apache-2.0
"""The rows that may draft: as vLLM's runner knows them after a step, or its scheduler before it."""

from __future__ import annotations

from typing import Any

from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.request_options import admitted_limit


def of_runner(
    runner: Any, engine: Engine, sampled_token_ids: list[list[int]], most: int, stats: Stats
) -> Candidates:
    """The rows of a V1 runner that have just got a token, with how many tokens each may draft.

    sampled_token_ids: by row, [] while it is in prefill.
    most: tokens that vLLM lets a row draft.
    """
    state, req_ids = runner.input_batch, runner.input_batch.req_ids
    index = [i for i, sampled in enumerate(sampled_token_ids) if sampled]
    most = min(most, engine.most_drafts(max(1, len(index))))
    positions = [int(state.num_tokens_no_spec[i]) - 1 for i in index]
    blocks = state.block_table[0].num_blocks_per_row
    bounds, left, opted_out = [], [], 0
    for i, position in zip(index, positions, strict=True):
        request = runner.requests[req_ids[i]]
        asked = _asked(request)
        opted_out += asked == 0
        left.append(_left(request, position))
        each = {
            "request": most if asked is None else asked,
            "slots": int(blocks[i]) * engine.block_size - position,
            "max_model_len": engine.max_model_len - 2 - position,
        }
        bounds.append(_bound(each, left[-1], most, stats))
    return Candidates(
        index=index,
        req_ids=[req_ids[i] for i in index],
        tokens=[sampled_token_ids[i][-1] for i in index],
        positions=positions,
        bounds=bounds,
        left=left,
        opted_out=opted_out,
    )


def of_scheduler(
    rows: list[tuple[Any, int]], engine: Engine, most: int, stats: Stats
) -> Candidates:
    """The same of a step that has been scheduled; nobody knows its tokens or its place yet.

    rows: requests, and up to where their step computes them at most.
    """
    most = min(most, engine.most_drafts(len(rows)))
    bounds, left, opted_out = [], [], 0
    for request, computed in rows:
        asked = _asked(request)
        opted_out += asked == 0
        left.append(_most_left(request))
        each = {
            "request": most if asked is None else asked,
            "max_model_len": engine.max_model_len - 2 - computed,
        }
        bounds.append(_bound(each, left[-1], most, stats))
        if getattr(request, "resumable", False):
            # vLLM may take what is computed beyond its end for the beginning of its next turn.
            bounds[-1] = min(bounds[-1], max(0, left[-1] - 1))
    return Candidates(
        index=[],
        req_ids=[request.request_id for request, _ in rows],
        tokens=[],
        positions=[request.num_tokens - 1 for request, _ in rows],
        bounds=bounds,
        left=left,
        opted_out=opted_out,
    )


def _asked(request: Any) -> int | None:
    return admitted_limit(getattr(request.sampling_params, "extra_args", None))


def _bound(each: dict[str, int], left: int, most: int, stats: Stats) -> int:
    """The least of them; counts what keeps the row from drafting `most` tokens that are kept."""
    reason = min(each, key=each.__getitem__)
    if min(each[reason], left - 1) < most:
        stats.clipped_rows[reason if each[reason] < left else "max_tokens"] += 1
    return max(0, min(most, each[reason]))


def _left(request: Any, position: int) -> int:
    """Tokens the request may still produce after its newest one at `position`."""
    limit = getattr(request.sampling_params, "max_tokens", None)
    if limit is None:
        return 1 << 30
    return int(request.num_prompt_tokens) + int(limit) - (position + 1)


def _most_left(request: Any) -> int:
    """Upper bound of the same after the token that the request's step samples."""
    under_way = 1 if request.num_output_placeholders > 0 else 0
    return int(request.max_tokens) - int(request.num_output_tokens) - under_way - 1
