# SPDX-License-Identifier: Apache-2.0
"""Eager twins of `dp_relax` and `gather_branches`."""

from __future__ import annotations

import torch

from knapspec_vllm.kernels.relaxed import TOLERANCE, Relaxed

#: float32 elements normalised at once: 1 MiB stays in a core's cache between the passes over it.
_CHUNK_ELEMENTS = 1 << 18


def dp_relax(
    # [N, R, d]: streams after FULL; row 0 is the target's
    full: torch.Tensor,
    # [N, R, d]: streams after WINDOW
    window: torch.Tensor | None,
    # [N, R, d]: streams after SKIP, that is, before the item
    skip: torch.Tensor | None,
    # [N] float32: share of the item time saved before the item
    saved: torch.Tensor,
    # [N] bool: branches before the item that hold a plan
    alive: torch.Tensor,
    # [3] float32: what FULL, WINDOW and SKIP save; negative forbids the mode
    savings: torch.Tensor,
    *,
    rows_out: int,
    prune_cosine: float,
    max_saving: float,
    exchange_rate: float,
) -> Relaxed:
    """The M - 1 best of all modes of all branches, and the target as row 0; M is rows_out.

    A candidate's error is 0.5 * |x / |x| - t / |t||^2 in its mean over the tokens, t the target's
    state: 1 - cosine, but exact where the cosine is close to 1. Candidates need a live parent, an
    error of at most 1 - prune_cosine and a saving of at most max_saving; FULL of the target is row
    0 and no candidate. The best of each of M - 1 equal ranges of saving go on, then the best of the
    rest; better is the higher exchange_rate * saving - error. Dominated candidates are dropped, the
    later of two equal ones too; ties go to the lower index.

    Without window and skip the item always runs: row i stays row i, with its saving, and is alive
    if it was and its error allows it; M is N then.
    """
    number = full.shape[0]
    streams = [states for states in (full, window, skip) if states is not None]
    # [K * N], K streams
    error = _errors(streams)
    near = error <= 1.0 - prune_cosine
    if len(streams) == 1:
        rows = torch.arange(number, dtype=torch.int32, device=full.device)
        near &= alive
        near[:1].fill_(True)  # not near[0] = True: a CUDA graph cannot capture a scalar's way in
        return Relaxed(rows, rows, torch.zeros_like(rows), saved, error, near)
    mode_step = 2 if window is None else 1
    # [K, 1]
    gains = savings[: mode_step * len(streams) : mode_step, None]
    pool_saved = (saved + gains).flatten()
    allowed = (alive & (gains >= 0.0)).flatten() & near & (pool_saved <= max_saving)
    allowed[:1].fill_(False)
    chosen, kept = _select(pool_saved, error, allowed, rows_out - 1, exchange_rate)
    rows = torch.zeros(rows_out, dtype=torch.int32, device=full.device)
    rows[1:] = chosen * kept
    new_alive = torch.ones(rows_out, dtype=torch.bool, device=full.device)
    new_alive[1:] = kept
    return Relaxed(
        rows,
        rows % number,
        rows // number * mode_step,
        pool_saved.index_select(0, rows),
        error.index_select(0, rows),
        new_alive,
    )


def gather_branches(
    # [N, R, d]
    full: torch.Tensor,
    # [N, R, d]
    window: torch.Tensor | None,
    # [N, R, d]
    skip: torch.Tensor | None,
    # [M] int32
    rows: torch.Tensor,
) -> torch.Tensor:
    """The streams [M, R, d] at `rows` of full, window and skip stacked; a copy."""
    streams = [states for states in (full, window, skip) if states is not None]
    # The copy that stacks is cheaper than blending three gathers, and index_select several times
    # cheaper than indexing.
    stacked = torch.cat(streams) if len(streams) > 1 else full
    return stacked.index_select(0, rows)


def _errors(
    # [N, R, d] each; row 0 of the first is the target
    streams: list[torch.Tensor],
) -> torch.Tensor:
    """[K * N] float32: error of every branch of every stream."""
    number, tokens, dim = streams[0].shape
    size = max(1, min(number, _CHUNK_ELEMENTS // (tokens * dim)))
    buffer = streams[0].new_empty(size, tokens, dim, dtype=torch.float32)
    target: torch.Tensor | None = None
    errors = []
    for states in streams:
        for chunk in states.split(size):
            unit = buffer[: len(chunk)].copy_(chunk)
            norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
            unit.mul_(norm.clamp_min_(1e-12).reciprocal_())
            target = unit[0].clone() if target is None else target
            errors.append(torch.linalg.vector_norm(unit.sub_(target), dim=-1))
    return torch.cat(errors).square_().mean(-1).mul_(0.5)


def _select(
    # [M] float32
    saved: torch.Tensor,
    # [M] float32
    error: torch.Tensor,
    # [M] bool
    allowed: torch.Tensor,
    live: int,
    exchange_rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [live] int64 of the candidates that go on, best first, and whether each is one.

    The ranges divide what is saved at this depth, not at the end: early on, branches differ by a
    few items only.
    """
    # [M, M]: the column saves at least as much as the row with no more error
    as_good = (saved - saved[:, None] >= -TOLERANCE) & (error - error[:, None] <= TOLERANCE)
    # Of two that are as good as each other the first dominates.
    dominated = (as_good & ~as_good.T.triu() & allowed).any(dim=1)
    allowed = allowed & ~dominated
    score = torch.where(allowed, exchange_rate * saved - error, -torch.inf)
    order = torch.sort(score, descending=True, stable=True).indices
    reach = (saved * allowed).amax().clamp_min(TOLERANCE)
    bin_of = (saved / reach * live).index_select(0, order).long().clamp_(0, max(live - 1, 0))
    # In order of score, a candidate leads its range if it is the first in it.
    ranks = torch.arange(len(saved), device=saved.device)
    first = torch.full((max(live, 1),), len(saved), device=saved.device)
    first.scatter_reduce_(0, bin_of, ranks, "amin")
    behind = first.index_select(0, bin_of) != ranks
    # Candidates that are not allowed score lowest: they stay last, whether they lead or not.
    behind |= ~allowed.index_select(0, order)
    chosen = order.index_select(0, torch.sort(ranks + len(saved) * behind).indices[:live])
    return chosen, allowed.index_select(0, chosen)
