# SPDX-License-Identifier: Apache-2.0
"""The solver's selection as loops over candidates, and inputs to compare `dp_relax` with it on."""

import math

import pytest
import torch

from knapspec_vllm import ops
from knapspec_vllm.kernels.relaxed import TOLERANCE, Relaxed
from tests.helpers_kernels import assert_close

FULL, WINDOW, SKIP = 0, 1, 2
MODES = [
    pytest.param((FULL, WINDOW, SKIP), id="full-window-skip"),
    pytest.param((FULL, SKIP), id="full-skip"),
    pytest.param((FULL, WINDOW), id="full-window"),
]
# States are exact in float32 whatever their dtype, and all sums are in float32, so one tolerance
# serves all dtypes: that of a sum's order, relative to an error that is a sum of squares.
RELATIVE = 1e-5
# Of the target to itself: float32's rounding of a unit vector, squared.
ABSOLUTE = 1e-13


def naive_errors(target, streams) -> list[float]:
    """Of every branch of every stream, in float64."""
    unit = torch.nn.functional.normalize(target.double().cpu(), dim=-1)
    found = []
    for states in streams:
        for branch in states.double().cpu():
            apart = torch.nn.functional.normalize(branch, dim=-1) - unit
            found.append(0.5 * float(apart.square().sum(-1).mean()))
    return found


def naive_select(saved, error, allowed, live, rate) -> list[int]:
    """Candidates that go on, best first."""

    def dominates(j: int, i: int) -> bool:
        more, less = saved[j] - saved[i], error[j] - error[i]
        if not allowed[j] or more < -TOLERANCE or less > TOLERANCE:
            return False
        return more > TOLERANCE or less < -TOLERANCE or j < i

    everyone = range(len(saved))
    left = [i for i in everyone if allowed[i] and not any(dominates(j, i) for j in everyone)]
    if not left:
        return []
    left.sort(key=lambda i: (error[i] - rate * saved[i], i))
    # A range's edge is where float32 puts it.
    reach = torch.tensor(max([saved[i] for i in left] + [TOLERANCE]))
    leaders: dict[int, int] = {}
    for i in left:
        leaders.setdefault(min(int(torch.tensor(saved[i]) / reach * live), live - 1), i)
    first = sorted(leaders.values(), key=left.index)
    return (first + [i for i in left if i not in first])[:live]


def check(
    modes, streams, saved, alive, savings, *, rows_out=None, prune=0.5, cap=0.75, rate=0.137
) -> Relaxed:
    """Runs the op and compares all it says of live branches; returns its result.

    rows_out: as many as there are branches, unless given.
    """
    given = dict(zip(modes, streams, strict=True))
    full = given[FULL]
    number = len(full)
    rows_out = number if rows_out is None else rows_out
    got = ops.dp_relax(
        full, given.get(WINDOW), given.get(SKIP), saved, alive, savings,
        rows_out=rows_out, prune_cosine=prune, max_saving=cap, exchange_rate=rate,
    )  # fmt: skip
    dtypes = [torch.int32] * 3 + [torch.float32] * 2 + [torch.bool]
    for field, dtype in zip(got, dtypes, strict=True):
        assert field.shape == (rows_out,)
        assert field.dtype == dtype
        assert field.device == full.device

    error = naive_errors(full[0], streams)
    totals = [(saved + savings[mode]).tolist() for mode in modes]
    total = [value for column in totals for value in column]
    alive, savings = alive.tolist(), savings.tolist()
    allowed = []
    for place in range(len(total)):
        mode, parent = modes[place // number], place % number
        candidate = parent != 0 or mode != FULL
        fits = error[place] <= 1 - prune and total[place] <= cap
        allowed.append(alive[parent] and candidate and fits and savings[mode] >= 0)
    rows = [0, *naive_select(total, error, allowed, rows_out - 1, rate)]
    live = len(rows)
    wanted = {
        "alive": [True] * live,
        "rows": rows,
        "parents": [row % number for row in rows],
        "modes": [modes[row // number] for row in rows],
        "saved": [total[row] for row in rows],
    }
    for name, values in wanted.items():
        found = getattr(got, name)[:live].tolist()
        assert found == values, f"{name}: {found}, wanted {values}"
    assert not got.alive[live:].any()
    want = torch.tensor([error[row] for row in rows], dtype=torch.float64)
    assert_close("error", want, got.error[:live], ABSOLUTE, RELATIVE)
    # A dead row repeats the target: it must be fit to gather by, and to run a layer on.
    for field in got[:5]:
        assert torch.equal(field[live:], field[:1].expand(rows_out - live))
    return got


def near(target, number, spread, dtype=torch.float32):
    """[N, R, d] at random distances of up to `spread` from the target, and of any length."""
    distance = spread * torch.rand(number, 1, 1)
    states = target + distance * target.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(
        torch.randn(number, *target.shape), dim=-1
    )
    return (states * (0.5 + torch.rand(number, target.shape[0], 1))).to(dtype)


def random_case(number, tokens, dim, modes, device, dtype=torch.float32, spread=1.2):
    """Streams (the first row of the first is the target), saved, alive and savings."""
    target = torch.randn(tokens, dim)
    streams = [near(target, number, spread, dtype).to(device) for _ in modes]
    saved = torch.randint(0, 24, (number,)) / 64  # equal savings, exactly
    alive = torch.rand(number) < 0.85
    alive[0] = True
    return streams, saved.to(device), alive.to(device), torch.tensor([0, 1 / 64, 3 / 64]).to(device)


def at_errors(rows: list[list[float]], device) -> list[torch.Tensor]:
    """Streams [N, 1, 2] whose branches have these errors to the state (1, 0)."""
    cosines = [[1 - error for error in stream] for stream in rows]
    states = [[[[c, math.sqrt(1 - c * c)]] for c in stream] for stream in cosines]
    return [torch.tensor(stream, device=device) for stream in states]


def tensors(device, *lists) -> list[torch.Tensor]:
    return [torch.tensor(values, device=device) for values in lists]
