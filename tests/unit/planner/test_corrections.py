# SPDX-License-Identifier: Apache-2.0
"""Factors by hand: fallbacks, clipping, forgetting, and when the policy has to look again."""

import pytest

from knapspec_vllm.planner.corrections import Corrections, kind_of
from knapspec_vllm.planner.types import Batch

ONE, LONG, MANY = Batch(1, 300), Batch(1, 5000), Batch(8, 2400)


def observe(made, part, batch, time_us, rounds=1000):
    """Rounds predicted to take 100."""
    for _ in range(rounds):
        made.observe(part, batch, 100.0, time_us)


def test_nothing_learned_changes_nothing():
    made = Corrections()
    assert [made.factor(part, ONE) for part in ("plain", "verify", "draft")] == [1.0] * 3
    assert made.version == 0


def test_each_part_and_kind_of_batch_has_its_own():
    made = Corrections()
    observe(made, "plain", ONE, 110.0)
    observe(made, "verify", ONE, 150.0)
    observe(made, "plain", MANY, 80.0)
    assert made.factor("plain", ONE) == pytest.approx(1.1)
    assert made.factor("plain", Batch(1, 310)) == pytest.approx(1.1)
    assert made.factor("plain", MANY) == pytest.approx(0.8)
    assert made.factor("verify", ONE) == pytest.approx(1.5)
    assert made.factor("draft", ONE) == 1.0


def test_falls_back_to_all_batches_and_verify_to_plain():
    made = Corrections()
    observe(made, "plain", ONE, 120.0)
    assert made.factor("plain", LONG) == pytest.approx(1.2)
    assert made.factor("verify", LONG) == pytest.approx(1.2)
    assert made.factor("draft", LONG) == 1.0
    assert made.count("plain", LONG) == 0
    assert made.count("plain", ONE) == 1000


def test_what_all_batches_show_of_drafting_is_relative_to_their_plain_steps():
    """A first batch of 256 rows with steps twice as long as priced drafted for dozens of rounds."""
    made = Corrections()
    for part in ("plain", "verify", "draft"):
        observe(made, part, MANY, 100.0)
    large = Batch(256, 400_000)
    for _ in range(3):
        made.observe("plain", large, 100.0, 200.0)
    plain = made.factor("plain", large)
    assert plain > 1.4
    everywhere = made.factor("plain", Batch(64, 64 * 40_000))
    for part in ("verify", "draft"):
        assert made.factor(part, large) == pytest.approx(plain / everywhere)


def test_a_new_kind_of_batch_starts_from_what_all_have_shown():
    made = Corrections()
    observe(made, "draft", ONE, 150.0)
    made.observe("draft", LONG, 100.0, 100.0)
    assert made.factor("draft", LONG) == pytest.approx(1.5 ** (4 / 5))


def test_a_context_that_grows_into_the_next_kind_keeps_what_is_known():
    """Requests of 2,000 tokens have 2,048 soon; all batches say less about them."""
    made = Corrections()
    observe(made, "plain", Batch(1, 2000), 120.0)
    observe(made, "plain", MANY, 60.0)
    assert made.factor("plain", Batch(1, 2100)) == pytest.approx(1.2)
    assert made.factor("plain", Batch(1, 1000)) == pytest.approx(1.2)
    assert made.count("plain", Batch(1, 2100)) == 0
    assert made.factor("plain", Batch(1, 9000)) < 1.0  # of all
    # Relative to plain steps: what all parts share belongs to its time.
    observe(made, "draft", Batch(1, 2000), 180.0)
    observe(made, "plain", Batch(1, 2100), 100.0)
    assert made.factor("draft", Batch(1, 2100)) == pytest.approx(1.5)
    # The neighbour that was seen more.
    observe(made, "draft", Batch(1, 9000), 80.0, rounds=2)
    assert made.factor("draft", Batch(1, 4100)) == pytest.approx(
        made.factor("draft", Batch(1, 9000))
    )
    observe(made, "draft", Batch(1, 2100), 150.0, rounds=9)
    assert made.factor("draft", Batch(1, 4100)) == pytest.approx(1.5, rel=0.01)


def test_beliefs_weigh_at_first_and_are_forgotten_later():
    made = Corrections()
    made.observe("draft", ONE, 100.0, 132.0)
    assert made.factor("draft", ONE) == pytest.approx(1.32 ** (1 / 5))  # four rounds of belief
    made.observe("plain", ONE, 100.0, 121.0)
    assert made.factor("plain", ONE) == pytest.approx(1.1)  # one
    observe(made, "draft", ONE, 90.0, rounds=300)
    assert made.factor("draft", ONE) == pytest.approx(0.9, rel=1e-3)


def test_one_outlier_moves_little():
    """A compile or a pause; the first draft of a server must not be its last."""
    made = Corrections()
    made.observe("draft", ONE, 100.0, 1e9)
    assert made.factor("draft", ONE) == pytest.approx(2.0 ** (1 / 5))
    made.observe("draft", MANY, 100.0, 0.1)
    assert made.factor("draft", MANY) > 0.9
    observe(made, "draft", ONE, 100.0, rounds=8)
    assert made.factor("draft", ONE) == pytest.approx(1.05, abs=0.03)


def test_a_factor_beyond_the_clip_is_learned():
    """Twice a round further than what is known, so that four times as long takes more rounds."""
    made = Corrections()
    observe(made, "verify", ONE, 500.0, rounds=100)
    assert made.factor("verify", ONE) == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize("established", [0, 1000])
def test_rounds_that_are_much_shorter_than_believed_are_believed_at_once(established):
    """Nothing makes a round shorter by chance; longer ones may be any pause."""
    made = Corrections()
    observe(made, "plain", ONE, 100.0, rounds=established)
    for time_us in (2.0, 3.0):
        made.observe("plain", ONE, 100.0, time_us)
        assert made.factor("plain", ONE) > 0.3
        assert made.doubted("plain", ONE)
    made.observe("plain", ONE, 100.0, 2.5)
    assert made.factor("plain", ONE) == pytest.approx(0.028, rel=0.05)  # near the longest
    assert not made.doubted("plain", ONE)
    made.observe("plain", ONE, 100.0, 2.0)
    assert made.factor("plain", ONE) < 0.027
    long = Corrections()
    observe(long, "plain", ONE, 100.0, rounds=established or 10)
    observe(long, "plain", ONE, 1e4, rounds=3)
    assert long.factor("plain", ONE) < 2.0


def test_batches_of_all_kinds_in_turn_refute_nothing():
    """256 rows at three times what is priced, then one row as priced: nobody was wrong."""
    made, large = Corrections(), Batch(256, 100_000)
    observe(made, "verify", large, 300.0)
    before = made._means["verify", None].log_factor
    observe(made, "verify", ONE, 100.0, rounds=1)
    observe(made, "verify", large, 300.0, rounds=1)
    observe(made, "verify", ONE, 100.0, rounds=4)
    assert made._means["verify", None].log_factor > 0.8 * before
    assert made.factor("verify", large) == pytest.approx(3.0, rel=0.01)


def test_what_refutes_one_part_has_plain_steps_looked_at_once():
    made = Corrections()
    for part in ("plain", "draft"):
        observe(made, part, ONE, 100.0)
    observe(made, "draft", ONE, 10.0, rounds=3)
    assert made.factor("draft", ONE) == pytest.approx(0.1)
    assert made.doubted("plain", ONE)
    before = made.factor("plain", ONE)
    made.observe("plain", ONE, 100.0, 105.0)
    assert not made.doubted("plain", ONE)
    assert made.factor("plain", ONE) == pytest.approx(before, rel=0.01)  # as established as it was


def test_short_rounds_have_to_come_in_a_row():
    made = Corrections()
    observe(made, "draft", ONE, 100.0)
    for _ in range(3):
        observe(made, "draft", ONE, 3.0, rounds=2)
        observe(made, "draft", ONE, 100.0, rounds=1)
    assert made.factor("draft", ONE) > 0.85


def test_drafting_is_doubted_after_a_long_while_without_it():
    made = Corrections()
    observe(made, "draft", ONE, 400.0)
    observe(made, "plain", ONE, 121.0)
    version = made.version
    made.forget()
    assert made.version > version
    # Half-way, as a factor, to what all parts share.
    assert made.factor("draft", ONE) == pytest.approx((4.0 * 1.21) ** 0.5)
    assert made.factor("plain", ONE) == pytest.approx(1.21)  # is seen all the time
    observe(made, "draft", ONE, 100.0, rounds=20)
    assert made.factor("draft", ONE) < 1.2


def test_what_all_parts_share_is_not_doubted():
    """Curves of a busy machine are off alike; a quotient of the parts has to stay what it is."""
    made = Corrections()
    for part in ("plain", "verify", "draft"):
        observe(made, part, ONE, 67.0)
    for _ in range(20):
        made.forget()
    assert made.factor("draft", ONE) == pytest.approx(made.factor("plain", ONE))
    assert made.factor("verify", ONE) == pytest.approx(made.factor("plain", ONE))


def test_the_first_round_of_one_kind_counts_once_for_others():
    made = Corrections()
    made.observe("draft", ONE, 100.0, 1e9)
    assert made.factor("draft", MANY) == pytest.approx(2.0 ** (1 / 5))


def test_version_grows_only_when_a_factor_moves():
    made = Corrections()
    observe(made, "plain", ONE, 110.0)
    version = made.version
    assert version > 0
    made.observe("plain", ONE, 100.0, 110.0)
    assert made.version == version
    made.observe("plain", ONE, 100.0, 150.0)
    assert made.version > version


def test_disabled_learns_nothing():
    made = Corrections(enabled=False)
    made.observe("plain", ONE, 100.0, 150.0)
    assert made.factor("plain", ONE) == 1.0
    assert made.version == 0


def test_a_full_server_and_one_that_waits_for_the_next_request_are_of_a_kind():
    kinds = [kind_of(Batch(rows, 500 * rows)) for rows in range(1, 34)]
    changes = [rows for rows in range(2, 34) if kinds[rows - 1] != kinds[rows - 2]]
    assert changes == [2, 3, 5, 9, 17, 33]
