# SPDX-License-Identifier: Apache-2.0
"""Acceptance by distance: what reference tokens and verification say of one number."""

import math

import pytest

from knapspec_vllm.planner.slope import SLOPE, Slope, distance_of

DISTANCES = (0.03, 0.1, 0.2, 0.4)


def test_distance_of_states_of_length_one():
    assert distance_of(1.0) == 0.0
    assert distance_of(1.0 + 1e-6) == 0.0  # a rounding error
    assert distance_of(0.0) == pytest.approx(math.sqrt(2.0))
    x, t = (math.cos(0.3), math.sin(0.3)), (1.0, 0.0)
    assert distance_of(x[0]) == pytest.approx(math.dist(x, t))


def agreeing(slope: float, trials: float) -> list[tuple[float, float, float]]:
    return [(d, trials * math.exp(-slope * d), trials) for d in DISTANCES]


@pytest.mark.parametrize("slope", [0.7, 2.0, 2.8])
def test_many_reference_tokens_say_it(slope):
    found = Slope()
    found.learn_references(agreeing(slope, 2000))
    assert found.value == found.solver == pytest.approx(slope, rel=0.06)


def test_a_few_are_believed_in_part():
    found = Slope()
    found.learn_references([(d, 16.0, 16.0) for d in DISTANCES])
    assert 0.2 < found.value < 0.5 * SLOPE
    found.learn_references([])
    assert found.value == SLOPE


def test_states_that_all_point_the_same_way():
    """Cosines of 0.99995 and more, and yet every other token is another one."""
    found = Slope()
    found.learn_references([(0.01, 8.0, 16.0), (0.008, 9.0, 16.0)])
    assert math.exp(-found.value * 0.01) < 0.8


def test_plans_of_one_solve_count_as_one():
    """Their reference tokens are the same."""
    once, often = Slope(), Slope()
    once.learn_references([(0.2, 10.0, 16.0)])
    often.learn_references([(0.2, 10.0, 16.0)] * 30)
    assert once.value == often.value


def test_verification_moves_it_and_is_replaced():
    found = Slope()
    found.learn_references(agreeing(1.0, 16))
    before = found.solver
    found.learn_verified([(0.1, 70.0, 30.0)])
    assert found.value > 1.5 * before
    assert found.solver == before
    found.learn_verified([(0.1, 70.0, 30.0)])
    again = found.value
    found.learn_verified([(0.1, 700.0, 300.0)])
    assert found.value == again, "no more than so many tokens count"
    found.learn_verified([])
    assert found.value == before


@pytest.mark.parametrize(
    ("distance", "accepted", "rejected", "ratio"), [(0.1, 0.0, 500.0, 4.0), (1.0, 5e3, 0.0, 0.5)]
)
def test_one_plan_changes_it_by_so_much_at_most(distance, accepted, rejected, ratio):
    found = Slope()
    found.learn_references(agreeing(2.0, 50))
    found.learn_verified([(distance, accepted, rejected)])
    assert found.value == pytest.approx(ratio * found.solver)
