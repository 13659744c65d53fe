# SPDX-License-Identifier: Apache-2.0
"""DEL: drafts leave after some layer; which one, and how many tokens, follows the text.

After arXiv 2504.05598. The target's own states after every layer go through the final norm and the
head; the share of these shadow tokens that are the target's is the acceptance of leaving there. One
target pass and one head per layer judge every exit. Tokens per layer, which the paper maximises, is
what our policy maximises with measured prices in place of the number of layers.

Made for checkpoints trained to be left early (LayerSkip). Others put little of their answer into
the middle layers, so that no exit drafts well: measured there, the method declines.
"""

from __future__ import annotations

import torch

from knapspec_vllm.planner.baselines.evaluate import agreement, estimate
from knapspec_vllm.planner.solver import BranchRunner, ItemWeights, SolverSettings
from knapspec_vllm.planner.types import Mode, Plan, PlanEstimate

SOLVE_EVERY = 16
"""Rounds between solves. The published code adds a round's shadow tokens to counts that fade by 5%
a round, some 20 rounds; judging the newest tokens every 16 sees the same text. Every round would
cost a target pass and its heads again, which the published code has for free from verification."""


class DynamicExit:
    """Keeps nothing from one solve to the next; verification's feedback lives in the policy."""

    name = "del"
    resolve_every = SOLVE_EVERY
    reference_tokens = 64

    @torch.no_grad()
    def solve(
        self, runner: BranchRunner, weights: ItemWeights, settings: SolverSettings
    ) -> tuple[PlanEstimate, ...]:
        """A plan for every exit, the last layer's first, from max(1, keep_first_layers) layers on.

        keep_last_layers and max_saving do not apply: skipping the last layers is the method, and
        the checkpoints it is for are left after a quarter of theirs. Layers cost the same, so the
        item weights do not matter.
        """
        layers = runner.num_layers
        least = max(1, settings.keep_first_layers)
        if least >= layers:
            return ()
        states = runner.reference_states().unsqueeze(0)
        depths = []
        for layer in range(layers):
            states, _ = runner.attention(layer, states, False)
            states = runner.mlp(layer, states)
            if layer + 1 >= least:
                depths.append(states)
        depths.reverse()  # the target first
        found = agreement(runner, torch.cat(depths), settings.live_branches)
        estimates = []
        for skipped, (cosine, hits) in enumerate(found.T.tolist()):
            if skipped:
                modes = [Mode.FULL] * (2 * (layers - skipped)) + [Mode.SKIP] * (2 * skipped)
                estimates.append(estimate(Plan(tuple(modes)), cosine, hits, states.shape[1]))
        return tuple(estimates)
