# SPDX-License-Identifier: Apache-2.0
"""Which candidates `dp_relax` lets go on: against loops, and by hand where a rule shows."""

import pytest
import torch

from tests.helpers_relax import FULL, MODES, SKIP, WINDOW, at_errors, check, random_case, tensors

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("implementation")]


@pytest.mark.parametrize("modes", MODES)
def test_matches_loops_at_the_default_size(modes, device):
    """Most candidates are dominated, several ranges are empty, and not all rows are filled."""
    case = random_case(33, 1, 4, modes, device)
    check(modes, *case)
    check(modes, *case, rows_out=16)


def test_more_candidates_than_rows_and_chunks(device):
    """On a curve of saving against error nobody dominates: all compete for ranges and rows."""
    number, savings = 90, [0.0, 0.003, 0.01]
    saved = 0.6 * torch.rand(number)
    saved[0] = 0.0
    pool = [saved.double() + gain for gain in savings]
    streams = at_errors([(0.1 * s + 0.3 * s * s).tolist() for s in pool], device)
    values = saved.to(device), *tensors(device, [True] * number, savings)
    # At this rate scores are further apart than float32 rounds them.
    for rows_out in (number, 2 * number, number // 3):
        got = check((FULL, WINDOW, SKIP), streams, *values, rows_out=rows_out, rate=0.01)
        assert got.alive.all()


@pytest.mark.parametrize(
    "saved, error, survivor",
    [
        pytest.param(0.25 + 2**-24, 1e-3, 1, id="saving-differs-by-rounding"),
        pytest.param(0.25 + 2**-18, 1e-3, 2, id="saving-differs"),
        pytest.param(0.25, 1e-3 - 5e-8, 1, id="error-differs-by-rounding"),
        pytest.param(0.25, 1e-3 - 5e-7, 2, id="error-differs"),
        pytest.param(0.25, 1e-3, 1, id="equal"),
    ],
)
def test_rounding_dominates_nothing(saved, error, survivor, device):
    """Of two candidates that differ by rounding the first is kept, though the second is better."""
    streams = at_errors([[0.0, 1e-3, error], [0.3] * 3], device)
    values = tensors(device, [0.0, 0.25, saved], [True] * 3, [0.0, 0.0, -1.0])
    got = check((FULL, SKIP), streams, *values)
    assert got.rows.tolist()[:2] == [0, survivor]
    assert got.alive.tolist() == [True, True, False]


def test_equal_scores_go_to_the_lower_index(device):
    """Errors of 0, 1/2, 1 and 3/2 are exact: a token is either the target's or its opposite."""
    signs = [[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [1, -1, -1, -1]]
    full = torch.tensor(signs, device=device)[..., None] * torch.tensor([1.0, 0.0], device=device)
    values = tensors(device, [0.0, 0.5, 1.0, 8.0], [True] * 4, [0.0, 0.0, -1.0])
    got = check((FULL, SKIP), [full, full], *values, prune=-1.0, cap=9.0, rate=1.0)
    # 1 and 2 are in one range with a score of 0; 1 leads it, 2 comes after all that lead.
    assert got.rows.tolist() == [0, 3, 1, 2]
    full, values[0] = full[[0, 2, 1, 3]], values[0][[0, 2, 1, 3]]
    got = check((FULL, SKIP), [full, full], *values, prune=-1.0, cap=9.0, rate=1.0)
    assert got.rows.tolist() == [0, 3, 1, 2]


def test_leader_of_a_range_beats_a_better_second_of_another(device):
    # Row 3, SKIP of the target, has a score of -0.008, but row 1 leads its range with 0.0. Row 2
    # has -0.33, and nothing else saves as much.
    streams = at_errors([[0.0, 0.01, 0.40], [0.02, 0.9, 0.9]], device)
    values = tensors(device, [0.0, 0.10, 0.70], [True] * 3, [0.0, 0.0, 0.12])
    got = check((FULL, SKIP), streams, *values, rate=0.1)
    assert got.rows.tolist() == [0, 1, 2]


def test_ranges_end_at_the_highest_saving_of_a_candidate(device):
    # Of a reach of 0.2 rows 1 and 4 are in the first third, 2 at the end of the last. Of the 0.7
    # that a dead branch saves all three are in the first, and 4 would come before 2.
    streams = at_errors([[0.0, 0.01, 0.1, 0.2], [0.012, 0.9, 0.9, 0.9]], device)
    alive = [True, True, True, False]
    values = tensors(device, [0.0, 0.05, 0.20, 0.70], alive, [0.0, 0.0, 0.06])
    got = check((FULL, SKIP), streams, *values, rate=0.1)
    assert got.rows.tolist() == [0, 1, 2, 4]
    # The candidate at the very end, row 2, is in the last range and not in one of its own.
    streams = at_errors([[0.0, 0.01, 0.03], [0.004, 0.9, 0.9]], device)
    values = tensors(device, [0.0, 0.3, 0.4], [True] * 3, [0.0, 0.0, 0.05])
    got = check((FULL, SKIP), streams, *values, rate=0.1)
    assert got.rows.tolist() == [0, 1, 3]


@pytest.mark.parametrize("modes", MODES)
def test_forbidden_modes_caps_and_pruning(modes, device):
    streams, saved, alive, savings = random_case(8, 2, 16, modes, device)
    savings[modes[-1]] = -1 / 64
    got = check(modes, streams, saved, alive, savings)
    assert modes[-1] not in got.modes[got.alive].tolist()
    check(modes, streams, saved, alive, savings.abs(), cap=0.2)
    check(modes, streams, saved, alive, savings.abs(), prune=0.9)
    # No candidate at all, not even SKIP of the target: the target goes on alone.
    got = check(modes, streams, saved, alive, savings.abs(), prune=1.1)
    assert got.alive.tolist() == [True] + [False] * 7
