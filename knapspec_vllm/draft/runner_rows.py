# SPDX-License-Identifier: Apache-2.0
"""The rows that may draft: as vLLM's runner knows them after a step, or its scheduler before it."""

from __future__ import annotations

from typing import Any, Protocol

from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.request_options import admitted_limit


class Limits(Protocol):
    """Of an engine; see `Engine`."""

    @property
    def max_model_len(self) -> int: ...
    def most_drafts(self, rows: int) -> int: ...


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
    requests = [runner.requests[req_ids[i]] for i in index]
    left = [_left(*pair) for pair in zip(requests, positions, strict=True)]
    room = [
        {
            "slots": int(blocks[i]) * engine.block_size - position,
            "max_model_len": engine.max_model_len - 2 - position,
        }
        for i, position in zip(index, positions, strict=True)
    ]
    bounds, opted_out = _bounds(requests, room, left, most, stats)
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
    rows: list[tuple[Any, int]], limits: Limits, most: int, stats: Stats
) -> Candidates:
    """The same of a step that has been scheduled; nobody knows its tokens or its place yet.

    rows: requests, and up to where their step computes them at most.
    """
    most = min(most, limits.most_drafts(len(rows)))
    requests = [request for request, _ in rows]
    left = [_most_left(request) for request in requests]
    room = [{"max_model_len": limits.max_model_len - 2 - computed} for _, computed in rows]
    bounds, opted_out = _bounds(requests, room, left, most, stats)
    return Candidates(
        index=[],
        req_ids=[request.request_id for request in requests],
        tokens=[],
        positions=[request.num_tokens - 1 for request in requests],
        bounds=bounds,
        left=left,
        opted_out=opted_out,
    )


def _bounds(
    requests: list[Any], room: list[dict[str, int]], left: list[int], most: int, stats: Stats
) -> tuple[list[int], int]:
    """(`Candidates.bounds`, requests that want no speculation); counts what keeps rows from
    drafting `most` tokens that are kept.

    room: by reason, what else bounds each of them.
    """
    bounds, opted_out = [], 0
    for request, others, remaining in zip(requests, room, left, strict=True):
        asked = admitted_limit(getattr(request.sampling_params, "extra_args", None))
        opted_out += asked == 0
        each = {"request": most if asked is None else asked, **others}
        reason = min(each, key=each.__getitem__)
        kept = min(each[reason], remaining - 1)
        if kept < most:
            stats.clipped_rows[reason if each[reason] < remaining else "max_tokens"] += 1
        # vLLM may take what is computed beyond a turn's end for the beginning of the next.
        bound = kept if getattr(request, "resumable", False) else each[reason]
        bounds.append(max(0, min(most, bound)))
    return bounds, opted_out


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
