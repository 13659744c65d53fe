# SPDX-License-Identifier: Apache-2.0
"""CLaSp: whole layers, skipped by dynamic programming on the newest verified tokens.

After arXiv 2505.24196. g[i, j] holds the states after i layers of the best path that has skipped j:

    g[i, j] = whichever of  f_i(g[i-1, j])  and  g[i-1, j-1]  has the higher cosine to X[i]

with X[i] the target's states after layer i; g[i, 0] is the target itself. All j of a layer run in
one batch, as in the published code (there as one sequence under a mask). That code returns the path
of one given number of skipped layers, which leaves the choice of it to the user; the table holds
all of them, so all are returned, for the policy to choose from. It takes X from the last accepted
token; here the mean cosine over all reference tokens decides, as one token is a noisy judge.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from knapspec_vllm.planner.baselines.evaluate import agreement, estimate
from knapspec_vllm.planner.selection import pareto
from knapspec_vllm.planner.solver import BranchRunner, ItemWeights, SolverSettings
from knapspec_vllm.planner.types import Mode, Plan, PlanEstimate

SOLVE_EVERY = 128
"""Rounds between solves. A solve costs more than a verify step, so the paper makes it rarer too:
there speedup grows with the interval up to 128 and falls beyond (neighbouring tokens want the same
layers). A table over several tokens is dearer than one over one, so no less here."""


class Clasp:
    """Keeps nothing from one solve to the next."""

    name = "clasp"
    resolve_every = SOLVE_EVERY
    reference_tokens = 16

    @torch.no_grad()
    def solve(
        self, runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
    ) -> tuple[PlanEstimate, ...]:
        """Plans for the numbers of skipped layers, less those dominated; see `pareto`.

        Layers cost the same, so the item weights do not matter.
        """
        layers = runner.num_layers
        free = layers - settings.keep_first_layers - settings.keep_last_layers
        most = min(free, int(settings.max_saving * layers + 1e-9))
        if most < 1:
            return ()
        states, skips = fill_table(runner, most, settings)
        found = torch.cat([agreement(runner, states, settings.live_branches), skips])
        cosines, hits, *choices = found.tolist()
        estimates = []
        for skipped in range(1, most + 1):
            plan = _backtrack(choices, skipped, layers, settings.keep_first_layers)
            judged = estimate(plan, cosines[skipped], hits[skipped], states.shape[1])
            estimates.append((skipped / layers, judged))
        return pareto(estimates, settings.bins)


def fill_table(runner: BranchRunner, most: int, settings: SolverSettings) -> tuple[Tensor, Tensor]:
    """Final states g[L, 0..most], [most + 1, R, d], and [free layers, most + 1] whether skipped.

    Two rows of the table are alive at a time, and no value reaches the host.
    """
    layers = runner.num_layers
    states = runner.reference_states().unsqueeze(0)
    choices = []
    for layer in range(layers):
        after = _run_layer(runner, layer, states, settings.live_branches)
        if settings.keep_first_layers <= layer < layers - settings.keep_last_layers:
            states, skipped = _relax(states, after, most)
            choices.append(F.pad(skipped.float(), (0, most + 1 - len(skipped))))
        else:
            states = after
    return states, torch.stack(choices)


def _relax(before: Tensor, after: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """One layer of the table: [n, R, d] states before and after it -> ([m, R, d], [m] bool).

    m = n + 1, up to most + 1.
    """
    number, reached = len(before), min(len(before), most)
    run, skip = _closeness(after, after[0])[1:], _closeness(before, after[0])[:reached]
    if reached == number:  # so many skips are reached by skipping only
        run = F.pad(run, (0, 1), value=-torch.inf)
        after = torch.cat([after, after[:1]])
    skipped = skip >= run
    best = torch.where(skipped[:, None, None], before[:reached], after[1:])
    return torch.cat([after[:1], best]), F.pad(skipped, (1, 0))


def _closeness(states: Tensor, target: Tensor) -> Tensor:
    """[N, R, d] -> [N] float32: cosine to the target [R, d], mean over tokens."""
    return F.cosine_similarity(states.float(), target.float(), dim=-1).mean(dim=1)


def _run_layer(runner: BranchRunner, layer: int, states: Tensor, live_branches: int) -> Tensor:
    """[N, R, d] after attention and MLP."""
    parts = []
    for part in states.split(live_branches + 1):
        full, _ = runner.attention(layer, part, False)
        parts.append(runner.mlp(layer, full))
    return torch.cat(parts)


def _backtrack(choices: list[list[float]], skipped: int, layers: int, first: int) -> Plan:
    modes = [Mode.FULL] * (2 * layers)
    for index in reversed(range(len(choices))):
        if choices[index][skipped]:
            layer = first + index
            modes[2 * layer] = modes[2 * layer + 1] = Mode.SKIP
            skipped -= 1
    return Plan(tuple(modes))
