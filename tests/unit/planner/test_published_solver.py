# SPDX-License-Identifier: Apache-2.0
"""The oracle does what the publication says: its plans, its costs and its limits."""

import itertools
import math

import pytest
import torch

from knapspec_vllm.planner.types import Mode, Plan
from tests.helpers_planner import TorchRunner, random_model
from tests.published_solver import (
    branch_mask,
    integer_weights,
    solve_published,
    target_states,
)

LAYERS = 5


class OneSequence(TorchRunner):
    """A TorchRunner of one row that also takes masks; attention written without its code."""

    def masked_attention(self, layer, states, positions, mask):
        weights, hd = self.model.layers[layer], self.model.head_dim
        x = self._norm(states, weights.norm_attention)
        rope = self._rope[:, positions]
        q = self._rotate((x @ weights.q.T).view(len(x), -1, hd), rope)
        k = self._rotate((x @ weights.k.T).view(len(x), -1, hd), rope)
        v = (x @ weights.v.T).view(len(x), -1, hd)
        past_k, past_v = (cached[0] for cached in self._cache[layer])
        groups = self.model.heads // self.model.kv_heads
        k = torch.cat([past_k, k]).repeat_interleave(groups, dim=1)
        v = torch.cat([past_v, v]).repeat_interleave(groups, dim=1)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(hd)
        out = torch.einsum("hts,shd->thd", (scores + mask).softmax(-1), v)
        return states + out.reshape(len(x), -1) @ weights.o.T


def made(seed=0, layers=LAYERS, scales=None, references=12):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (1, 20 + references), generator=generator)
    return OneSequence(random_model(seed, layers, scales), tokens, references)


def run_plan(runner, plan):
    """Final states [R, d] of one plan, alone, through the other attention of the helper."""
    states = runner.reference_states().unsqueeze(0)
    for layer in range(runner.num_layers):
        if plan.attention(layer) is Mode.FULL:
            states = runner.attention(layer, states, False)[0]
        if plan.mlp(layer) is Mode.FULL:
            states = runner.mlp(layer, states)
    return states[0]


def skipped_weight(plan, weights):
    attention, mlp = (plan.count(kind, Mode.SKIP) for kind in ("attention", "mlp"))
    return attention * weights[0] + mlp * weights[1]


@pytest.mark.parametrize(
    ("attention_us", "mlp_us", "expected"),
    [
        (1, 3, (1, 3)),
        (3, 1, (3, 1)),
        (2, 2, (1, 1)),
        (1, 1.4, (1, 1)),
        (90, 1, (5, 1)),
        (1, 9, (1, 5)),
    ],
)
def test_integer_weights_are_capped(attention_us, mlp_us, expected):
    assert integer_weights(attention_us, mlp_us) == expected


def test_mask_is_block_diagonal_behind_the_prefix():
    sees = torch.tensor(
        [
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    mask = branch_mask(2, 2, 2, torch.float32)
    assert torch.equal(mask == 0, sees)
    assert (mask[~sees] == torch.finfo(torch.float32).min).all()


def test_target_states_are_the_full_model():
    runner = made()
    states = target_states(runner)
    assert len(states) == 2 * LAYERS + 1
    torch.testing.assert_close(states[-1], run_plan(runner, Plan.full(LAYERS)))


@pytest.mark.parametrize("seed", range(4))
def test_states_of_a_plan_are_those_of_running_it(seed):
    """Concatenated paths do not see each other, and backtracking returns the path that was run."""
    runner = made(seed)
    result = solve_published(runner, target_states(runner), 1.0, 3.0, prune_cosine=0.2)
    target = run_plan(runner, Plan.full(LAYERS))
    assert len(result.estimates) >= 4
    for estimate, states in zip(result.estimates, result.states, strict=True):
        alone = run_plan(runner, estimate.plan)
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)
        cosine = torch.nn.functional.cosine_similarity(alone, target, dim=-1).mean()
        assert estimate.cosine == pytest.approx(float(cosine), abs=1e-5)
        assert estimate.trials == 12
        assert estimate.hits == int((runner.top1(alone) == runner.top1(target)).sum())


@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 3.0), (2.0, 1.0)])
def test_budgets_and_kept_layers(costs):
    """Plans save exactly their budget, at most half of the weight, and never touch the ends."""
    runner = made(1)
    result = solve_published(runner, target_states(runner), *costs, prune_cosine=-1.0)
    weights = integer_weights(*costs)
    assert list(result.budgets) == sorted(set(result.budgets))
    assert result.budgets[0] > 0
    assert result.budgets[-1] <= sum(weights) * LAYERS // 2
    for budget, estimate in zip(result.budgets, result.estimates, strict=True):
        assert skipped_weight(estimate.plan, weights) == budget
        ends = estimate.plan.modes[:2] + estimate.plan.modes[-2:]
        assert set(ends) == {Mode.FULL}


def test_equals_enumeration_where_no_two_paths_meet():
    """Three layers: only two items are free, so every plan within the budget is found."""
    runner = made(2, layers=3)
    result = solve_published(runner, target_states(runner), 1.0, 3.0, prune_cosine=-1.0)
    full = (Mode.FULL,) * 2
    middles = itertools.product((Mode.FULL, Mode.SKIP), repeat=2)
    plans = {Plan(full + middle + full) for middle in middles} - {Plan.full(3)}
    assert {estimate.plan for estimate in result.estimates} == plans
    assert result.budgets == (1, 3, 4)


def test_keeps_the_better_of_two_paths_that_meet():
    """Four layers, equal weights, budget 1 of two free attentions and two free MLPs: by hand,
    the path that skips an item is replaced at every depth where skipping a later one is closer."""
    runner = made(3, layers=4)
    targets = target_states(runner)
    result = solve_published(runner, targets, 1.0, 1.0, prune_cosine=-1.0)

    def cosine(states, depth):
        return torch.nn.functional.cosine_similarity(states, targets[depth], dim=-1).mean()

    best, state = None, None
    positions = torch.arange(runner.prefix, runner.prefix + 12)
    mask = branch_mask(1, 12, runner.prefix, torch.float32)
    for item in range(2, 8):
        if state is not None:
            run = runner.mlp if item % 2 else runner.masked_attention
            state = run(item // 2, state, *(() if item % 2 else (positions, mask)))
        skip_here = targets[item]  # states before this item on the path that has skipped nothing
        if item < 6 and (state is None or cosine(skip_here, item + 1) > cosine(state, item + 1)):
            best, state = item, skip_here
    plan = result.estimates[result.budgets.index(1)].plan
    assert [i for i, mode in enumerate(plan.modes) if mode is Mode.SKIP] == [best]


def test_prunes_paths_below_the_cosine_at_any_depth():
    runner = made(4)
    targets = target_states(runner)

    def lowest(plan):
        """Of the cosines a plan has on its way."""
        states, found = runner.reference_states().unsqueeze(0), []
        for item, mode in enumerate(plan.modes):
            if mode is Mode.FULL:
                attend = not item % 2
                states = (
                    runner.attention(item // 2, states, False)[0]
                    if attend
                    else (runner.mlp(item // 2, states))
                )
            cosine = torch.nn.functional.cosine_similarity(states[0], targets[item + 1], dim=-1)
            found.append(float(cosine.mean()))
        return min(found)

    pruned = solve_published(runner, targets, 1.0, 1.0, prune_cosine=0.9)
    kept = solve_published(runner, targets, 1.0, 1.0, prune_cosine=-1.0)
    assert pruned.estimates
    assert all(lowest(estimate.plan) >= 0.9 - 1e-5 for estimate in pruned.estimates)
    assert any(lowest(estimate.plan) < 0.9 for estimate in kept.estimates)
    assert pruned.executed < kept.executed


def test_nothing_left_is_no_plan():
    runner = made(5, scales=[0.05] * (2 * LAYERS))
    targets = target_states(runner)
    away = [-states for states in targets]
    away[2] = targets[2]
    result = solve_published(runner, away, 1.0, 1.0)
    assert (result.estimates, result.executed) == ((), 1)


class Still:
    """Items change nothing, so nothing is pruned and every budget is reached."""

    prefix = 1

    def __init__(self, layers):
        self.num_layers = layers

    def reference_states(self):
        return torch.ones(1, 2)

    def masked_attention(self, layer, states, positions, mask):
        return states

    def mlp(self, layer, states):
        return states

    def top1(self, states):
        return torch.zeros(states.shape[:-1], dtype=torch.int64)


@pytest.mark.parametrize(
    ("layers", "costs", "executed"),
    [(36, (1, 1), 1924), (30, (1, 3), 2592), (36, (1, 3), 52 * 72), (36, (1, 5), 78 * 72)],
)
def test_work_is_that_of_the_published_table(layers, costs, executed):
    """Items run by an unpruned solve: counts worked out independently from the official code; the
    last two are known as whole multiples of a forward only."""
    model = Still(layers)
    found = solve_published(model, target_states(model), *costs).executed
    assert found == pytest.approx(executed, abs=36 if executed % 72 == 0 else 0)
