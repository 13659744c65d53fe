# SPDX-License-Identifier: Apache-2.0
"""`DeviceChooser` against `Policy`: the same decisions over many rounds of the same history.

Float32 against float64 may differ where a decision is within 1e-5 of a tie; such rounds are let
pass, counted, and both go on from the choice of `Policy`. Over 300 lines because both sides of
every history are driven by one class.
"""

import random

import pytest
import torch

from knapspec_vllm import envs, ops
from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.curves import Curve
from knapspec_vllm.planner.device_choice import DeviceChooser
from knapspec_vllm.planner.policy import Policy
from knapspec_vllm.planner.types import Batch, Frontier, Mode, Plan, PlanEstimate
from tests.helpers_policy import BATCH, HALF, LAYERS, LIGHT, costs, frontier

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST = 8
RELATIVE = 1e-5
OTHER = Plan.parse("skip attn:2-6 mlp:2-6", LAYERS)


@pytest.fixture(params=["eager", "triton"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv(envs.KERNELS, "eager" if request.param == "eager" else "auto")
    ops.launches.clear()
    yield request.param
    assert {kind for _, kind in ops.launches} <= {request.param}


class Pair:
    """A policy and a chooser that are told the same."""

    def __init__(self, model, **settings):
        self.config = KnapSpecConfig(**settings)
        self.acceptance = AcceptanceModel(self.config.prior_weight, self.config.feedback_half_life)
        layers = model.num_layers
        self.policy = Policy(self.config, model, self.acceptance, MOST, layers)
        self.policy._may_measure = False  # the caller's business, see DeviceChooser
        self.chooser = DeviceChooser(model, self.config, DEVICE)
        self.rounds = self.ties = self.drafted = self.declined = 0

    def set_frontier(self, found):
        self.policy.set_frontier(found)
        self.chooser.set_frontier(found, self.acceptance)

    def observe_round(self, batch, plan, length, slower):
        """A round that took `slower` times what the cost model says."""
        costs = self.policy.costs
        step_us = costs.step_us(batch, 1 + length)
        self.policy.observe_step(batch, 1 + length, slower * step_us)
        if plan is not None:
            draft_us = length * costs.draft_us(plan, batch)
            self.policy.observe_draft(batch, plan, length, slower**0.5 * draft_us)

    def choose(self, lengths, max_draft_length=MOST):
        """The choice of both: (plan or None, draft length)."""
        batch = Batch(max(sum(n > 0 for n in lengths), 1), sum(lengths))
        self.chooser.set_acceptance(self.acceptance, batch.context_per_row)
        corrections = self.policy._corrections
        parts = ("plain", "verify", "draft")
        factors = [corrections.factor(part, batch) for part in parts]
        kept = self.acceptance.kept(batch.context_per_row)
        self.chooser.set_corrections(*factors, kept)
        self.policy._tables.clear()  # else a batch whose context is within 6% may be priced for it
        tie = self._near_tie(batch, max_draft_length)
        found = self.chooser.choose(torch.tensor(lengths, device=DEVICE), max_draft_length)
        index, length = found.choice.tolist()
        got = (self.chooser.plans[index] if index >= 0 else None, length)
        choice = self.policy.choose(batch, max_draft_length)
        want = (choice.plan, choice.draft_length)
        self.rounds += 1
        self.drafted += length > 0
        self.declined += length == 0
        if got != want:
            assert tie, f"{got} for {want}: {choice.reason}"
            self.ties += 1
            place = -1 if want[0] is None else self.chooser.plans.index(want[0])
            self.chooser._current.copy_(torch.tensor([place, want[1]]))
        elif length:
            speedup = choice.predicted_speedup
            assert float(found.speedup) == pytest.approx(speedup, rel=RELATIVE)
        return want

    def _near_tie(self, batch, max_draft_length):
        """Whether some comparison of this round is within RELATIVE of going the other way."""
        policy = self.policy
        lengths = policy._lengths(max_draft_length)
        if policy.frontier is None or not policy.frontier.estimates or not lengths:
            return False
        table = policy._table(batch, lengths)
        index, column = policy._with_hysteresis(table)
        chosen = table.speedups[index][column]
        plan = policy.frontier.estimates[index].plan
        doubted = self.acceptance.lower(plan, batch.context_per_row)
        values = sorted((value for row in table.speedups for value in row), reverse=True)
        margin = self.config.min_speedup - 1.0
        limits = [1.0 + margin, 1.0 + 0.5 * margin]
        pairs = [(chosen, limit) for limit in limits]
        pairs += [(table.rates.row(doubted, table.draft_us[index])[column], 1.0)]
        pairs += [(values[0], value) for value in values[1:2]]
        if policy._current is not None:
            held = [e.plan for e in policy.frontier.estimates]
            if policy._current[0] in held and policy._current[1] in lengths:
                row = table.speedups[held.index(policy._current[0])]
                kept = row[lengths.index(policy._current[1])]
                pairs += [(values[0], kept * (1.0 + self.config.hysteresis))]
        return any(abs(a / b - 1.0) < RELATIVE for a, b in pairs)


def random_curve(rng, low, high, token):
    rows = sorted(rng.sample([1, 2, 4, 8, 16, 32], rng.randint(1, 4)))
    base = [rng.uniform(low, high) * (1 + 0.02 * n) for n in rows]
    return Curve.guarded(rows, base, [rng.uniform(0, token) for _ in rows])


def random_costs(rng):
    steps = [1, *sorted(rng.sample(range(2, 10), rng.randint(1, 4)))]
    return CostModel(
        num_layers=LAYERS,
        window_tokens=rng.choice([64, 576]),
        steps=tuple((tokens, random_curve(rng, 900, 1300, 0.2)) for tokens in steps),
        fixed=random_curve(rng, 20, 150, 0.0),
        attention=random_curve(rng, 20, 50, 0.01),
        attention_window=random_curve(rng, 20, 40, 0.01),
        mlp=random_curve(rng, 30, 60, 0.0),
    )


def random_frontier(rng, most=12):
    estimates = []
    for _ in range(rng.randint(0, most)):
        modes = []
        for _ in range(LAYERS):
            modes.append(rng.choice([Mode.FULL, Mode.WINDOW, Mode.SKIP]))
            modes.append(rng.choice([Mode.FULL, Mode.SKIP]))
        trials = rng.choice([0, 16, 400])
        hits = round(trials * rng.uniform(0.5, 1.0))
        estimates.append(PlanEstimate(Plan(tuple(modes)), 0.9, hits, trials))
    return Frontier(tuple(estimates), 1000, 1, "solved")


def random_lengths(rng):
    rows = rng.choice([1, 1, 2, 5, 40])
    return [0] * rng.randint(0, 2) + [rng.randint(1, 6000) for _ in range(rows)]


SETTINGS = {
    "defaults": {},
    "paper": {"objective": "paper"},
    "hysteresis": {"hysteresis": 0.2, "min_speedup": 1.0},
    "eager to change": {"hysteresis": 0.0, "min_speedup": 1.0},
    "hard to start": {"min_speedup": 1.4},
    "always": {"always_draft": True},
    "forced length": {"draft_length": 3},
    "forced plan": {"plan": HALF.to_text()},
    "forced both": {"plan": HALF.to_text(), "draft_length": 5, "objective": "paper"},
    "nothing": {"draft_length": 0},
    "overhead": {"round_overhead_us": 90.0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_random_histories(settings, implementation):
    rng = random.Random(str(settings))
    drafted = declined = rounds = ties = 0
    for _ in range(12 if implementation == "eager" else 2):  # the interpreter is slow
        pair = Pair(random_costs(rng), **settings)
        lengths = random_lengths(rng)
        for step in range(12):
            if step in (1, 7):  # the first round has no frontier
                found = random_frontier(rng)
                if step == 7 and pair.policy.frontier and rng.random() < 0.5:
                    some = rng.sample(found.estimates, len(found.estimates) // 2)
                    both = (*some, *pair.policy.frontier.estimates[::-1])
                    found = Frontier(both, 1000, 1, "solved")
                pair.set_frontier(found)
            if rng.random() < 0.3:
                lengths = random_lengths(rng)
            plan, length = pair.choose(lengths, rng.choice([MOST, MOST, 4, 2, 1, 0]))
            batch = Batch(sum(n > 0 for n in lengths), sum(lengths))
            pair.observe_round(batch, plan, length, rng.uniform(0.8, 1.3))
            if plan is not None:
                accepted = rng.randint(0, length)
                pair.acceptance.observe(plan, [(accepted, length)], int(batch.context_per_row))
        rounds, ties = rounds + pair.rounds, ties + pair.ties
        drafted, declined = drafted + pair.drafted, declined + pair.declined
    assert ties <= rounds // 20
    assert declined  # at least the rounds without room
    assert bool(drafted) == (settings.get("draft_length") != 0)


def test_starts_stays_and_stops():
    """By hand: one draft of 550 us and a verify of 1200 us give (1 + alpha) / 1.75."""
    pair = Pair(costs(), min_speedup=1.1, prior_weight=1e-9, round_overhead_us=0.0)

    def settle(hits):
        pair.set_frontier(frontier((HALF, hits)))
        return pair.choose([1000], 1)[1]

    assert settle(920) == 0  # 1.097: too little to start
    assert settle(930) == 1  # 1.103
    assert settle(880) == 1  # 1.074: enough to stay
    assert settle(820) == 0  # 1.04
    assert settle(880) == 0


def test_does_not_start_on_a_lucky_handful():
    pair = Pair(costs(), min_speedup=1.03, prior_weight=1e-9, round_overhead_us=0.0)
    pair.set_frontier(frontier((HALF, 10), trials=12))
    assert pair.choose([1000], 1) == (None, 0)
    pair.set_frontier(frontier((HALF, 916)))
    assert pair.choose([1000], 1) == (HALF, 1)


def test_current_plan_is_found_in_a_new_frontier():
    """Only hysteresis explains that HALF goes on: OTHER costs the same and is accepted more."""
    pair, fresh = (
        Pair(costs(), hysteresis=0.5, min_speedup=1.0, prior_weight=1e-9) for _ in range(2)
    )
    pair.set_frontier(frontier((HALF, 900)))
    assert pair.choose([1000], 2) == (HALF, 2)
    for each, plan in ((pair, HALF), (fresh, OTHER)):
        each.set_frontier(frontier((LIGHT, 900), (OTHER, 950), (HALF, 900)))
        assert each.choose([1000], 2) == (plan, 2)


def test_staying_outlives_a_plan_that_is_gone():
    pair = Pair(costs(), min_speedup=1.1, prior_weight=1e-9)
    pair.set_frontier(frontier((HALF, 990)))
    assert pair.choose([1000], 1) == (HALF, 1)
    pair.set_frontier(frontier((OTHER, 880)))
    assert pair.choose([1000], 1) == (OTHER, 1)


def test_forced_plan_ignores_frontiers():
    pair = Pair(costs(), plan=LIGHT.to_text(), always_draft=True)
    pair.set_frontier(frontier((HALF, 990)))
    assert pair.chooser.plans == (LIGHT,)
    assert pair.choose([1000])[0] == LIGHT


def test_round_overhead_of_the_settings_counts_from_the_first_round():
    pair = Pair(costs(), round_overhead_us=500.0, always_draft=True)
    pair.set_frontier(frontier((HALF, 990)))
    assert pair.choose([1000], 1) == (HALF, 1)  # and its speedup is that of Policy


def test_refuses_a_frontier_of_another_model():
    pair = Pair(costs())
    other = frontier((Plan.full(LAYERS + 1), 9), trials=9)
    with pytest.raises(ValueError, match="10 layers"):
        pair.chooser.set_frontier(other, pair.acceptance)


def test_nothing_to_choose_from():
    pair = Pair(costs(), always_draft=True)
    assert pair.choose([1000]) == (None, 0)
    pair.set_frontier(frontier())
    assert pair.choose([1000]) == (None, 0)
    pair.set_frontier(frontier((HALF, 990)))
    assert pair.choose([1000], 0) == (None, 0)
    assert pair.choose([1000, 0], 1) == (HALF, 1)
    nothing = pair.chooser.choose(torch.zeros(3, dtype=torch.int32, device=DEVICE), 4)
    assert nothing.choice.tolist() == [-1, 0]  # padding alone; Policy is not asked then


def test_exact_context():
    """The table is that of the very batch, not of one within 6%."""
    pair = Pair(costs(attention_token_us=0.1), always_draft=True)
    pair.set_frontier(frontier((HALF, 990)))
    tables = [
        pair.chooser.choose(torch.tensor([n], device=DEVICE), 2).table.tolist()
        for n in (1000, 1001)
    ]
    assert tables[0] != tables[1]
    want = pair.policy.explain(Batch(1, BATCH.context_tokens))[0][3]
    longer = pair.chooser.choose(torch.tensor([BATCH.context_tokens], device=DEVICE), MOST)
    assert float(longer.table.max()) == pytest.approx(want, rel=RELATIVE)


@pytest.mark.gpu
def test_no_call_waits_for_the_device():
    pair = Pair(costs())
    lengths = torch.tensor([1000], device="cuda")
    found = frontier((HALF, 990))
    pair.chooser.set_frontier(found, pair.acceptance)
    pair.chooser.choose(lengths, 4)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        pair.chooser.set_frontier(found, pair.acceptance)
        pair.chooser.set_acceptance(pair.acceptance)
        pair.chooser.set_corrections(1.0, 2.0, 1.0)
        pair.chooser.choose(lengths, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
