# SPDX-License-Identifier: Apache-2.0
"""`plan_tpt` against loops in Python's float64 that search, interpolate and compare one by one.

Over 300 lines because the naive pricing of a whole cost model stands here beside its cases.
"""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch

from knapspec_vllm import ops
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.curves import Curve
from knapspec_vllm.planner.device_choice import curve_tables
from knapspec_vllm.planner.types import Batch, Mode
from tests.helpers_kernels import assert_close

pytestmark = pytest.mark.kernels

# Float32 sums of some ten terms that are all positive.
RELATIVE = 1e-5
ALWAYS = float("-inf")


@dataclass
class Case:
    """Arguments of one call, as plain numbers."""

    costs: CostModel
    counts: list[list[float]]
    mean: list[float]
    lower: list[float]
    lengths: list[int]
    corrections: tuple[float, ...] = (1.0, 1.0, 1.0, 0.0, 1.0)
    thresholds: tuple[float, float, float] = (0.03, ALWAYS, ALWAYS)
    current: tuple[int, int] = (-1, 0)
    longest: int = 8
    paper: bool = False
    shortest: int = 1
    length_dtype: torch.dtype = torch.int32

    def tensors(self, device):
        """[counts, alphas, lengths, corrections, thresholds, current]."""

        def floats(values, *shape):
            return torch.tensor(values, dtype=torch.float32, device=device).reshape(shape)

        plans = len(self.counts)
        return [
            floats(self.counts, plans, 3),
            floats([self.mean, self.lower], 2, plans),
            torch.tensor(self.lengths, dtype=self.length_dtype, device=device),
            floats(self.corrections, 5),
            floats(self.thresholds, 3),
            torch.tensor(self.current, dtype=torch.int32, device=device),
        ]

    def run(self, device, tensors=None):
        tables = curve_tables(self.costs, device, self.shortest)
        tensors = self.tensors(device) if tensors is None else tensors
        return ops.plan_tpt(tables, *tensors, max_draft_length=self.longest, paper=self.paper)


def naive_table(case, alphas):
    """[P][G] speedups, each from scratch."""
    batch = Batch(max(sum(n > 0 for n in case.lengths), 1), sum(case.lengths))
    items = [case.costs.item_us("attention", mode, batch) for mode in (Mode.FULL, Mode.WINDOW)]
    items.append(case.costs.item_us("mlp", Mode.FULL, batch))
    fixed_us, plain_us = case.costs.fixed_us(batch), case.costs.step_us(batch, 1)
    steps_us = [case.costs.step_us(batch, 2 + n) for n in range(case.longest)]
    plain, verify, draft, round_us, kept = case.corrections
    if case.paper:
        plain = verify = draft = kept = 1.0
        round_us = 0.0
        fixed_us, plain_us = 0.0, case.costs.num_layers * (items[0] + items[2])
        steps_us = [plain_us] * case.longest
    plain_us *= plain
    steps_us = [verify * time_us + round_us for time_us in steps_us]
    table = []
    for counts, alpha in zip(case.counts, alphas, strict=True):
        items_us = sum(count * us for count, us in zip(counts, items, strict=True))
        draft_us = draft * (fixed_us + items_us)
        powers = [[alpha**power for power in range(1, n + 2)] for n in range(case.longest)]
        tokens = [1.0 + kept * sum(column) for column in powers]
        times_us = [(n + 1) * draft_us + steps_us[n] for n in range(case.longest)]
        table.append([plain_us * n / us for n, us in zip(tokens, times_us, strict=True)])
    return table


def naive_choice(case, table, cautious):
    """((plan, draft length), speedup, least relative distance of a comparison from a tie)."""
    if not case.counts or not case.longest:
        return (-1, 0), 1.0, 1.0
    shortest = min(case.shortest, case.longest)
    hysteresis, start, stay = case.thresholds
    entries = itertools.product(range(len(table)), range(shortest, case.longest + 1))
    entries = {(p, g): table[p][g - 1] for p, g in entries}
    chosen = max(entries, key=entries.__getitem__)
    margins = [abs(entries[chosen] / v - 1) for e, v in entries.items() if e != chosen]
    if case.current in entries and case.current != chosen:
        kept = entries[case.current] * (1 + hysteresis)
        margins.append(abs(entries[chosen] / kept - 1))
        if entries[chosen] <= kept:
            chosen, margins = case.current, margins[-1:]
    speedup, doubted = entries[chosen], cautious[chosen[0]][chosen[1] - 1]
    drafted = case.current[1] > 0
    margins += [abs(speedup - (stay if drafted else start)), abs(doubted - 1.0)]
    refused = speedup < (stay if drafted else start) or not any(case.lengths)
    refused = refused or (not drafted and doubted < min(1.0, start))
    return (-1, 0) if refused else chosen, speedup, min(margins)


def check(case, device):
    """Whether a clear choice was compared; on a near tie only the table is."""
    found = case.run(device)
    table, cautious = naive_table(case, case.mean), naive_table(case, case.lower)
    want = torch.tensor(table, dtype=torch.float64).reshape(len(case.counts), case.longest)
    assert found.table.dtype is found.speedup.dtype is torch.float32
    assert found.choice.dtype is torch.int32
    assert_close("table", want, found.table, 0.0, RELATIVE)
    choice, speedup, margin = naive_choice(case, table, cautious)
    if margin < RELATIVE:
        return False
    assert tuple(found.choice.tolist()) == choice, f"{speedup} in {case}"
    assert float(found.speedup) == pytest.approx(speedup, rel=RELATIVE)
    return True


def curve(rng, low, high, token):
    """Of one to six measured numbers of rows, not even monotone: the op must not rely on it."""
    rows = sorted(rng.sample([1, 2, 3, 4, 6, 8, 16, 24, 32], rng.randint(1, 6)))
    base = [rng.uniform(low, high) * (1 + 0.01 * n) for n in rows]
    return Curve(tuple(rows), tuple(base), tuple(rng.uniform(0, token) for _ in rows))


def flat(time_us, rows=1):
    return Curve((rows,), (time_us,), (0.0,))


def random_costs(rng):
    steps = [1, *sorted(rng.sample(range(2, 12), rng.randint(1, 5)))]
    return CostModel(
        num_layers=20,
        window_tokens=rng.choice([64, 576]),
        steps=tuple((tokens, curve(rng, 900, 1800, 0.05)) for tokens in steps),
        fixed=curve(rng, 20, 200, 0.0),
        attention=curve(rng, 10, 40, 0.004),
        attention_window=curve(rng, 10, 30, 0.004),
        mlp=curve(rng, 20, 50, 0.0),
    )


def random_case(rng, plans, rows, longest):
    mean = [rng.uniform(0.3, 1.0) for _ in range(plans)]
    return Case(
        costs=random_costs(rng),
        counts=[[rng.randint(0, 10) for _ in range(3)] for _ in range(plans)],
        mean=mean,
        lower=[value * rng.uniform(0.7, 1.0) for value in mean],
        lengths=[rng.choice([0, rng.randint(1, 4000)]) for _ in range(rows)],
        corrections=(
            *(rng.uniform(0.7, 1.5) for _ in range(3)),
            rng.uniform(0, 200),
            rng.uniform(0.5, 1.0),
        ),
        thresholds=(rng.choice([0.0, 0.03, 0.3]), rng.uniform(0.9, 1.6), rng.uniform(0.9, 1.3)),
        current=rng.choice([(-1, 0), (rng.randrange(plans), rng.randint(1, longest)), (-1, 3)]),
        longest=longest,
        paper=rng.random() < 0.2,
        shortest=rng.choice([1, 1, 3]),
        length_dtype=rng.choice([torch.int32, torch.int64]),
    )


def by_hand(**settings):
    """One row: a plain step of 1000 us, any other of 1200; drafts of 400 and 300 us."""
    steps = ((1, flat(1000.0)), (2, flat(1200.0)), (9, flat(1200.0)))
    costs = CostModel(10, 512, steps, flat(100.0), flat(50.0), flat(50.0), flat(100.0))
    plans = dict(counts=[[2, 0, 2], [2, 0, 1]], mean=[0.9, 0.8], lower=[0.85, 0.75])
    return Case(**{"costs": costs, "lengths": [7], **plans, **settings})


@pytest.mark.parametrize(
    "plans, rows, longest",
    [(1, 1, 1), (5, 3, 8), (32, 8, 8), (33, 5, 17), (70, 2, 3), (5, 1025, 5)],
    ids=["one", "P5-G8", "P32-G8", "P33-G17", "three-tiles-of-plans", "two-tiles-of-rows"],
)
def test_random(plans, rows, longest, implementation, device):
    rng = random.Random(plans * 1000 + rows)
    # Near ties must not hide what is tested.
    assert sum(check(random_case(rng, plans, rows, longest), device) for _ in range(12)) >= 9


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 11, 16, 17, 40])
@pytest.mark.parametrize("context", [100, 2**30], ids=["short", "sum-beyond-int32"])
def test_rows_between_and_beyond_the_measured(rows, context, implementation, device):
    case = random_case(random.Random(7), 3, rows, 8)
    case.lengths = [context + row for row in range(rows)]
    grid, lone = Curve((2, 5, 8), (100.0, 170.0, 171.0), (0.01, 0.01, 0.2)), flat(9.0, rows=4)
    case.costs = CostModel(20, 64, ((1, grid), (2, grid), (5, grid)), grid, grid, grid, lone)
    check(case, device)


@pytest.mark.parametrize("grid", [(1, 2), (1, 4), (1, 2, 3), (1, 3, 6), (1, 2, 4, 8, 9)], ids=str)
def test_steps_between_and_beyond_the_measured_tokens(grid, implementation, device):
    """Dips are lifted to the steps before; the last slope goes on, from 1 there is none."""
    times = dict(zip(grid, (1000.0, 1400.0, 1100.0, 1900.0, 2000.0), strict=False))
    steps = tuple((n, flat(us)) for n, us in times.items())
    costs = CostModel(10, 64, steps, *[flat(10.0)] * 4)
    check(by_hand(costs=costs, longest=12), device)


@pytest.mark.parametrize("context", [63, 64, 65, 4000])
def test_window_that_covers_the_context_costs_what_full_costs(context, implementation, device):
    dear = Curve((1,), (500.0,), (1.0,))
    case = random_case(random.Random(3), 2, 1, 4)
    case.costs = replace(case.costs, window_tokens=64, attention_window=dear)
    case.counts, case.mean, case.paper = [[0, 9, 0], [9, 0, 0]], [0.9, 0.9], False
    case.lengths = [context, context, 0]
    check(case, device)
    table = case.run(device).table
    assert torch.equal(table[0], table[1]) == (context <= 64)


def test_first_of_equals_wins(implementation, device):
    case = by_hand(counts=[[2, 0, 2]] * 70, mean=[0.9] * 70, lower=[0.9] * 70)
    case.mean[:3] = [0.5, 0.5, 0.5]
    plan, length = case.run(device).choice.tolist()
    assert plan == 3
    case.current, case.thresholds = (60, length), (0.0, ALWAYS, ALWAYS)
    assert case.run(device).choice.tolist() == [60, length]  # but no equal replaces the current one
    # Free drafts: 2 tokens in 2000 us, 3 or 4 in 4000. Powers of two, so equal however they divide.
    steps = tuple((n, flat(us)) for n, us in ((1, 1000.0), (2, 2000.0), (3, 4000.0), (4, 4000.0)))
    costs = CostModel(10, 64, steps, *[flat(0.0)] * 4)
    case = by_hand(costs=costs, mean=[1.0, 1.0], longest=3)
    assert case.run(device).choice.tolist() == [0, 1]


@pytest.mark.parametrize("current", [(1, 2), (1, 3), (0, 8), (0, 9), (7, 2), (-1, 2), (-1, 0)])
@pytest.mark.parametrize("hysteresis", [0.0, 0.02, 0.5])
def test_hysteresis(current, hysteresis, implementation, device):
    """Keeps what is nearly as good, itself included, unless plan or length is offered no more."""
    assert check(by_hand(current=current, thresholds=(hysteresis, ALWAYS, ALWAYS)), device)


@pytest.mark.parametrize("start, stay", [(1.2, 1.1), (1.9, 1.1), (1.9, 1.8), (ALWAYS, ALWAYS)])
@pytest.mark.parametrize("lower", [0.0, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("current", [(-1, 0), (-1, 4), (0, 4)])
def test_thresholds(start, stay, lower, current, implementation, device):
    """Starting needs more than staying, and a cautious speedup of 1; ALWAYS needs nothing."""
    case = by_hand(thresholds=(0.03, start, stay), lower=[lower, lower], current=current)
    assert check(case, device)


@pytest.mark.parametrize("longest", [1, 2, 3, 8])
def test_shortest_draft(longest, implementation, device):
    """A forced length: as long as the batch has room for."""
    assert check(by_hand(shortest=3, longest=longest), device)


@pytest.mark.parametrize(
    "settings",
    [dict(counts=[], mean=[], lower=[]), dict(longest=0), dict(lengths=[]), dict(lengths=[0, 0])],
    ids=["plans", "room", "rows", "drafting-rows"],
)
def test_nothing_to_choose(settings, implementation, device):
    case = by_hand(current=(0, 2), **settings)
    check(case, device)
    assert case.run(device).choice.tolist() == [-1, 0]


def test_padding_rows_and_strides_change_nothing(implementation, device):
    case = random_case(random.Random(2), 3, 3, 8)
    case.lengths, case.current, case.thresholds = [900, 17, 3000], (-1, 0), (0.0, ALWAYS, 9.0)
    want = case.run(device)
    case.lengths = [0, 900, 0, 0, 17, 3000, 0, 0]
    apart = [torch.stack([tensor, tensor + 5], -1)[..., 0] for tensor in case.tensors(device)]
    assert not any(tensor.is_contiguous() for tensor in apart)
    found = case.run(device, apart)
    assert all(map(torch.equal, found, want))


def test_inputs_are_left_alone(implementation, device):
    """`current` may be the choice of the last call."""
    case = random_case(random.Random(4), 5, 3, 8)
    case.thresholds = (0.0, ALWAYS, ALWAYS)
    tensors = case.tensors(device)
    first = case.run(device, tensors)
    assert all(map(torch.equal, case.tensors(device), tensors))
    kept = first.choice.clone()
    second = case.run(device, [*tensors[:-1], first.choice])
    assert all(torch.equal(choice, kept) for choice in (first.choice, second.choice))


@pytest.mark.gpu
def test_cuda_graph_follows_its_inputs():
    """A replay reads lengths, acceptance and the last choice anew."""
    case = by_hand(lengths=[7, 0])
    tables, tensors = curve_tables(case.costs, "cuda"), case.tensors("cuda")
    ops.plan_tpt(tables, *tensors, max_draft_length=8)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.plan_tpt(tables, *tensors, max_draft_length=8)
    for mean, last in ((0.2, -1), (0.95, 0), (0.9, 1)):
        tensors[1].fill_(mean)
        tensors[2][1] += 100
        tensors[5].copy_(torch.tensor([last, 4]))
        graph.replay()
        want = ops.plan_tpt(tables, *tensors, max_draft_length=8)
        assert all(map(torch.equal, found, want))
