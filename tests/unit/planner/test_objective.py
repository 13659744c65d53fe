# SPDX-License-Identifier: Apache-2.0
"""Formulas against hand-computed numbers and against simulation."""

import random

import pytest

from knapspec_vllm.planner.objective import expected_tokens, paper_tpt, throughput_tpt


def test_expected_tokens_by_hand():
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(0.9, 2) == pytest.approx((1 - 0.9**3) / (1 - 0.9))
    assert expected_tokens(0.0, 5) == 1.0
    assert expected_tokens(0.7, 0) == 1.0
    assert expected_tokens(1.0, 8) == 9.0
    assert expected_tokens(1.0 - 1e-12, 8) == pytest.approx(9.0)


def test_expected_tokens_is_the_mean_of_rounds():
    generator, alpha, length, rounds = random.Random(1), 0.8, 4, 40_000
    tokens = 0
    for _ in range(rounds):
        tokens += 1
        for _ in range(length):
            if generator.random() >= alpha:
                break
            tokens += 1
    assert tokens / rounds == pytest.approx(expected_tokens(alpha, length), rel=0.01)


@pytest.mark.parametrize(("alpha", "length"), [(-0.1, 1), (1.1, 1), (0.5, -1)])
def test_impossible_arguments(alpha, length):
    with pytest.raises(ValueError, match="need 0 <= alpha"):
        expected_tokens(alpha, length)


def test_throughput_by_hand():
    # 4 rows, 1.5 tokens each, 1 draft of 10 us, verify 25 us, overhead 5 us.
    assert throughput_tpt(4, 0.5, 1, 10.0, 25.0, 5.0) == pytest.approx(4 * 1.5 / 40.0)


def test_paper_objective_is_the_special_case():
    assert paper_tpt(0.8, 3, 10.0, 30.0) == throughput_tpt(1, 0.8, 3, 10.0, 30.0, 0.0)
    assert paper_tpt(0.8, 3, 10.0, 30.0) == pytest.approx((1 - 0.8**4) / 0.2 / 60.0)
