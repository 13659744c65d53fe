# SPDX-License-Identifier: Apache-2.0
"""The published KnapSpec solver, as its official code runs it: an oracle for tests and benchmarks.

Written from descriptions of arXiv 2602.20217 (Algorithms 1 and 2) and of the repository
kaist-flexml-lab/knapspec, slow parts included; it shares only the vocabulary (Plan, PlanEstimate)
with knapspec_vllm's solver. g[i, j] holds the hidden states after i items of the best path that has
skipped integer weight j:

    g[i, j] = whichever of  f_i(g[i-1, j])  and  g[i-1, j - w_i]  has the higher cosine to X[i]

with X[i] the target's states, cosine the mean over tokens, paths below `prune_cosine` dropped, the
first layer and the two items of the last never skipped, and j up to half of the total weight. All
live paths of an item run in one pass, concatenated along the sequence under a dense additive mask;
candidates are compared one by one, and the states of all items are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from knapspec_vllm.planner.types import Mode, Plan, PlanEstimate

WEIGHT_CAP = 5


class PathModel(Protocol):
    """One sequence: R reference tokens behind a prefix whose keys and values are the target's."""

    num_layers: int
    prefix: int
    """Tokens before the reference tokens."""

    def reference_states(self) -> Tensor:
        """[R, d] residual stream after the embedding."""

    def masked_attention(
        self,
        layer: int,
        # [T, d]
        states: Tensor,
        # [T] int64, positions in the sequence
        positions: Tensor,
        # [T, prefix + T], added to the scores of the prefix's keys, then of the T own ones
        mask: Tensor,
    ) -> Tensor:
        """Streams after attention, residual included, [T, d]."""

    def mlp(self, layer: int, states: Tensor) -> Tensor:
        """Streams after the MLP, residual included; states [T, d]."""

    def top1(self, states: Tensor) -> Tensor:
        """[T] int64: most likely next token; states [T, d]."""


@dataclass(frozen=True)
class Cell:
    """g[i, j] and where it came from."""

    # [R, d]
    state: Tensor
    # [], mean cosine to the target at this depth
    score: Tensor
    #: j of the cell one item earlier.
    parent: int
    skipped: bool


@dataclass(frozen=True)
class PublishedResult:
    """One plan for every budget that was reached, by ascending skipped weight."""

    estimates: tuple[PlanEstimate, ...]
    #: Skipped integer weight of each.
    budgets: tuple[int, ...]
    #: Final hidden states of each, [R, d].
    states: tuple[Tensor, ...]
    #: Items run, one per path and item.
    executed: int


def integer_weights(attention_us: float, mlp_us: float) -> tuple[int, int]:
    """(attention, MLP) in units of the cheaper one, at most WEIGHT_CAP."""
    if attention_us <= 0 or mlp_us <= 0:
        raise ValueError(f"item times must be positive, got {attention_us} and {mlp_us}")
    if attention_us >= mlp_us:
        return min(round(attention_us / mlp_us), WEIGHT_CAP), 1
    return 1, min(round(mlp_us / attention_us), WEIGHT_CAP)


@torch.no_grad()
def target_states(model: PathModel) -> list[Tensor]:
    """X: [R, d] before the first item and after each of the 2L.

    The published method takes them from the verify pass, so they cost its solver nothing.
    """
    states = [model.reference_states()]
    positions = _positions(model, 1, states[0].shape[0])
    mask = branch_mask(1, states[0].shape[0], model.prefix, states[0].dtype)
    for layer in range(model.num_layers):
        states.append(model.masked_attention(layer, states[-1], positions, mask))
        states.append(model.mlp(layer, states[-1]))
    return states


@torch.no_grad()
def solve_published(
    model: PathModel,
    targets: list[Tensor],
    attention_us: float,
    mlp_us: float,
    prune_cosine: float = 0.5,
) -> PublishedResult:
    """Runs the path DP and backtracks every budget. targets: of `target_states`."""
    weights = integer_weights(attention_us, mlp_us)
    items = 2 * model.num_layers
    budget = sum(weights) * model.num_layers // 2
    start = Cell(targets[2], _scores(targets[2].unsqueeze(0), targets[2])[0], 0, False)
    # The first layer always runs; the table of all items is kept, as in the official code.
    table: list[dict[int, Cell]] = [{}, {}, {0: start}]
    executed = 0
    for item in range(2, items):
        live = sorted(table[item])
        if not live:
            return PublishedResult((), (), (), executed)
        before = torch.stack([table[item][j].state for j in live])
        after = _execute(model, item, before)
        executed += len(live)
        cells: dict[int, Cell] = {}
        best = torch.full((budget + 1,), -torch.inf, device=before.device)
        scores = _scores(after, targets[item + 1])
        for row, j in enumerate(live):
            if scores[row] >= prune_cosine and scores[row] > best[j]:
                best[j] = scores[row]
                cells[j] = Cell(after[row], scores[row], j, False)
        if item < items - 2:
            scores = _scores(before, targets[item + 1])
            for row, j in enumerate(live):
                reached = j + weights[item % 2]
                if reached > budget or scores[row] < prune_cosine:
                    continue
                if scores[row] > best[reached]:
                    best[reached] = scores[row]
                    cells[reached] = Cell(before[row], scores[row], j, True)
        table.append(cells)
    return _candidates(model, table, targets[-1], executed)


def _execute(model: PathModel, item: int, states: Tensor) -> Tensor:
    """Runs an item on all paths, [N, R, d], concatenated along the sequence."""
    paths, tokens, width = states.shape
    packed = states.reshape(paths * tokens, width)
    layer = item // 2
    if item % 2:
        return model.mlp(layer, packed).view(states.shape)
    positions = _positions(model, paths, tokens)
    mask = branch_mask(paths, tokens, model.prefix, states.dtype).to(states.device)
    return model.masked_attention(layer, packed, positions, mask).view(states.shape)


def _positions(model: PathModel, paths: int, tokens: int) -> Tensor:
    device = model.reference_states().device
    return torch.arange(model.prefix, model.prefix + tokens, device=device).repeat(paths)


def branch_mask(paths: int, tokens: int, prefix: int, dtype: torch.dtype) -> Tensor:
    """[N*R, prefix + N*R]: 0 for the prefix and a path's own tokens up to each, else the lowest.

    Built row by row with two slice writes, as in the official code.
    """
    rows = paths * tokens
    mask = torch.full((rows, prefix + rows), torch.finfo(dtype).min, dtype=dtype)
    for path in range(paths):
        first = prefix + path * tokens
        for token in range(tokens):
            row = path * tokens + token
            mask[row, :prefix] = 0.0
            mask[row, first : first + token + 1] = 0.0
    return mask


def _scores(states: Tensor, target: Tensor) -> Tensor:
    """[N]: cosine of states [N, R, d] to target [R, d], mean over tokens."""
    cosine = torch.nn.functional.cosine_similarity(states.float(), target.float(), dim=-1)
    return cosine.mean(dim=-1)


def _candidates(
    model: PathModel, table: list[dict[int, Cell]], target: Tensor, executed: int
) -> PublishedResult:
    """Agreement and plan of every budget but 0, where nothing is skipped."""
    budgets = tuple(j for j in sorted(table[-1]) if j)
    if not budgets:
        return PublishedResult((), (), (), executed)
    cells = [table[-1][j] for j in budgets]
    trials = target.shape[0]
    tokens = model.top1(torch.cat([cell.state for cell in cells])).view(len(cells), trials)
    hits = (tokens == model.top1(target)).sum(dim=1).tolist()
    estimates = tuple(
        PlanEstimate(_backtrack(table, j), min(float(cell.score), 1.0), hit, trials)
        for j, cell, hit in zip(budgets, cells, hits, strict=True)
    )
    return PublishedResult(estimates, budgets, tuple(cell.state for cell in cells), executed)


def _backtrack(table: list[dict[int, Cell]], budget: int) -> Plan:
    """The plan that led to g[2L, budget]."""
    modes = []
    for cells in reversed(table[3:]):
        cell = cells[budget]
        modes.append(Mode.SKIP if cell.skipped else Mode.FULL)
        budget = cell.parent
    return Plan((Mode.FULL, Mode.FULL, *reversed(modes)))
