# SPDX-License-Identifier: Apache-2.0
"""What rounds teach of the machine's pace, of kinds of batches and of parts; doubts, forgetting.

Over 300 lines because every belief that has misled a server is held here against one filter.
"""

import math
import random

import pytest

from knapspec_vllm.planner.corrections import Corrections, kind_of
from knapspec_vllm.planner.types import Batch

ONE, LONG, MANY = Batch(1, 300), Batch(1, 5000), Batch(8, 2400)
PARTS = ("plain", "verify", "draft")


def observe(made, part, batch, time_us, rounds=1000):
    """Rounds predicted to take 100."""
    for _ in range(rounds):
        made.observe(part, batch, 100.0, time_us)


def in_turn(made, batch, plain_us, verify_us, draft_us, rounds=100):
    """Plain rounds and rounds that draft, eight of each at a time."""
    for number in range(rounds):
        if number % 16 < 8:
            made.observe("plain", batch, 100.0, plain_us)
        else:
            made.observe("verify", batch, 100.0, verify_us)
            made.observe("draft", batch, 100.0, draft_us)


def test_nothing_learned_changes_nothing():
    made = Corrections()
    assert [made.factor(part, ONE) for part in PARTS] == [1.0] * 3
    assert made.version == 0


def test_each_part_and_kind_of_batch_has_its_own():
    made = Corrections()
    for _ in range(10):
        in_turn(made, ONE, 110.0, 150.0, 130.0)
        in_turn(made, MANY, 80.0, 80.0, 120.0)
    assert made.factor("plain", MANY) == pytest.approx(0.8, rel=0.02)
    assert made.relative("verify", ONE) == pytest.approx(150 / 110, rel=0.03)
    assert made.relative("draft", ONE) == pytest.approx(130 / 110, rel=0.03)
    assert made.relative("verify", MANY) == pytest.approx(1.0, rel=0.03)
    assert made.relative("draft", MANY) == pytest.approx(120 / 80, rel=0.03)
    assert made.factor("plain", ONE) == pytest.approx(1.1, rel=0.05)
    assert made.factor("plain", Batch(1, 310)) == made.factor("plain", ONE)
    assert made.relative("plain", ONE) == 1.0


def test_what_nobody_has_seen_is_off_by_the_pace():
    made = Corrections()
    observe(made, "plain", ONE, 120.0)
    for part in PARTS:
        assert made.factor(part, ONE) == pytest.approx(1.2, rel=1e-3)
        assert made.factor(part, LONG) == pytest.approx(1.2, rel=0.03)
    assert made.count("plain", LONG) == 0
    assert made.count("plain", ONE) == 1000


def test_plain_steps_keep_the_pace_while_everything_drafts():
    """The machine is twice as slow for a while and fast again; nobody looks at a plain step."""
    made = Corrections()
    in_turn(made, ONE, 100.0, 120.0, 110.0, rounds=320)
    for pace in (2.0, 1.0, 1.7, 0.8):
        for _ in range(60):
            made.observe("verify", ONE, 100.0, pace * 120.0)
            made.observe("draft", ONE, 100.0, pace * 110.0)
        assert made.factor("plain", ONE) == pytest.approx(pace, rel=0.05)
        assert made.relative("verify", ONE) == pytest.approx(1.2, rel=0.05)
        assert made.relative("draft", ONE) == pytest.approx(1.1, rel=0.05)


def test_only_turns_show_what_sets_verifying_apart():
    """Verify steps that become slower may be the machine's doing, until a plain step is not."""
    made = Corrections()
    in_turn(made, ONE, 100.0, 100.0, 100.0, rounds=320)
    observe(made, "verify", ONE, 150.0, rounds=100)
    assert made.relative("verify", ONE) < 1.1
    assert made.factor("plain", ONE) > 1.35
    for _ in range(8):
        made.observe("plain", ONE, 100.0, 100.0)
        observe(made, "verify", ONE, 150.0, rounds=30)
    assert made.relative("verify", ONE) > 1.3
    assert made.factor("plain", ONE) < 1.15


def test_a_kind_of_batch_that_is_slow_is_slow_in_all_its_parts():
    """A first batch of 256 rows with steps twice as long as priced drafted for dozens of rounds."""
    made = Corrections()
    in_turn(made, MANY, 100.0, 100.0, 100.0, rounds=320)
    large = Batch(256, 400_000)
    for _ in range(3):
        made.observe("plain", large, 100.0, 200.0)
    plain = made.factor("plain", large)
    assert plain > 1.6
    for part in ("verify", "draft"):
        assert made.factor(part, large) == pytest.approx(plain, rel=0.05)


def test_a_new_kind_of_batch_starts_from_what_all_have_shown():
    made = Corrections()
    in_turn(made, ONE, 100.0, 100.0, 150.0, rounds=320)
    assert made.relative("draft", MANY) > 1.25
    assert made.relative("draft", ONE) == pytest.approx(1.5, rel=0.02)
    in_turn(made, MANY, 100.0, 100.0, 100.0, rounds=64)
    assert made.relative("draft", MANY) == pytest.approx(1.0, abs=0.07)


def test_a_context_that_grows_into_the_next_kind_keeps_what_is_known():
    """Requests of 2,000 tokens have 2,048 soon; all batches say less about them."""
    made = Corrections()
    in_turn(made, Batch(1, 2000), 120.0, 180.0, 180.0, rounds=320)
    in_turn(made, MANY, 60.0, 60.0, 60.0, rounds=320)
    for tokens in (1000, 2100):
        near, known = Batch(1, tokens), Batch(1, 2000)
        assert made.count("plain", near) == 0
        for part in PARTS:
            assert made.factor(part, near) == pytest.approx(made.factor(part, known))
    far = Batch(1, 9000)
    assert made.relative("draft", far) < made.relative("draft", Batch(1, 2000))
    # The neighbour that was seen more.
    in_turn(made, far, 100.0, 80.0, 80.0, rounds=32)
    between = Batch(1, 4100)
    assert made.relative("draft", between) == made.relative("draft", far)
    in_turn(made, Batch(1, 2100), 100.0, 150.0, 150.0, rounds=320)
    assert made.relative("draft", between) == made.relative("draft", Batch(1, 2100))


def test_noise_is_averaged():
    """Of rounds that vary by a tenth, as measured ones do."""
    generator, made = random.Random(1), Corrections()
    for _ in range(40):
        for part, mean_us in (("plain", 100.0), ("verify", 130.0), ("draft", 90.0)):
            for _ in range(10):
                noise = math.exp(generator.gauss(0.0, 0.1))
                made.observe(part, ONE, 100.0, mean_us * noise)
    assert made.relative("verify", ONE) == pytest.approx(1.3, rel=0.05)
    assert made.relative("draft", ONE) == pytest.approx(0.9, rel=0.05)


@pytest.mark.parametrize("part", PARTS)
def test_one_outlier_moves_little(part):
    """A compile or a pause; the first draft of a server must not be its last."""
    made = Corrections()
    in_turn(made, ONE, 100.0, 100.0, 100.0, rounds=32)
    made.observe(part, ONE, 100.0, 1e9)
    for other in ("verify", "draft"):
        assert made.relative(other, ONE) == pytest.approx(1.0, abs=0.15)
    in_turn(made, ONE, 100.0, 100.0, 100.0, rounds=32)
    for other in PARTS:
        assert made.factor(other, ONE) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("times", [1.9, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("doubted", [0, 50])
def test_a_slow_first_draft_ends_nothing(times, doubted):
    """Of a server that has only declined, for however long."""
    made = Corrections()
    observe(made, "plain", ONE, 100.0)
    for _ in range(doubted):
        made.forget()
    for part in ("verify", "draft"):
        made.observe(part, ONE, 100.0, 100.0 * times)
        assert made.relative(part, ONE) < 1.35
    observe(made, "plain", ONE, 100.0, rounds=8)
    for part in ("verify", "draft"):
        assert made.relative(part, ONE) < 1.35


def test_hours_of_one_kind_leave_others_as_they_were():
    """Only sums are seen; their parts must not drift apart, nor doubt grow without end."""
    made = Corrections()
    in_turn(made, MANY, 100.0, 130.0, 130.0, rounds=320)
    generator = random.Random(2)
    for number in range(30_000):
        made.observe("plain", ONE, 100.0, 100.0 * math.exp(generator.gauss(0.0, 0.1)))
        if number % 3000 == 0:
            made.forget()
    deviations = made._covariance.diagonal() ** 0.5
    assert deviations.max() < 0.35
    assert made.factor("plain", MANY) == pytest.approx(1.0, rel=0.3)


def test_kinds_of_batch_do_not_pile_up():
    made = Corrections()
    for rows in range(8):
        for context in range(12):
            in_turn(made, Batch(2**rows, 2**rows * 2**context), 100.0, 150.0, 100.0, rounds=32)
    assert len(made._mean) <= 3 + 3 * 32
    assert made.relative("verify", Batch(128, 128 * 2048)) == pytest.approx(1.5, rel=0.05)
    assert made.relative("verify", ONE) > 1.2, "forgotten, but like the others"
    # What is forgotten counts as not measured: plain steps of it are, before it drafts.
    assert made.count("plain", ONE) == made.count("draft", ONE) == 0
    assert made.count("plain", Batch(128, 128 * 2048)) > 0
    assert len(made._counts) <= 3 * 32


def test_what_refutes_one_kind_leaves_others_alone():
    made = Corrections()
    for batch in (ONE, MANY, ONE, MANY):
        in_turn(made, batch, 100.0, 100.0, 100.0, rounds=160)
    observe(made, "verify", MANY, 100.0, rounds=1)
    observe(made, "verify", ONE, 20.0, rounds=3)
    assert made.factor("verify", ONE) == pytest.approx(0.2, rel=0.15)
    for part in ("verify", "draft"):
        assert made.relative(part, MANY) == pytest.approx(1.0, abs=0.1)


def test_a_factor_far_from_one_is_learned():
    made = Corrections()
    in_turn(made, ONE, 100.0, 500.0, 100.0, rounds=320)
    assert made.relative("verify", ONE) == pytest.approx(5.0, rel=0.1)


def test_the_first_round_of_all_shows_the_pace():
    """Curves of a busy machine may be off by anything."""
    made = Corrections()
    for time_us in (2.0, 3.0, 2.5):
        made.observe("plain", ONE, 100.0, time_us)
    assert made.factor("plain", ONE) == pytest.approx(0.026, rel=0.2)


def test_rounds_that_are_much_shorter_than_believed_are_believed_at_once():
    """Nothing makes a round shorter by chance; longer ones may be any pause."""
    made = Corrections()
    observe(made, "plain", ONE, 100.0)
    for time_us in (2.0, 3.0):
        made.observe("plain", ONE, 100.0, time_us)
        assert made.factor("plain", ONE) > 0.2
        assert made.doubted("plain", ONE)
    made.observe("plain", ONE, 100.0, 2.5)
    assert made.factor("plain", ONE) == pytest.approx(0.03, rel=0.1)  # the longest
    assert not made.doubted("plain", ONE)
    long = Corrections()
    observe(long, "plain", ONE, 100.0, rounds=1000)
    observe(long, "plain", ONE, 1e4, rounds=3)
    assert long.factor("plain", ONE) < 3.0


def test_batches_of_all_kinds_in_turn_refute_nothing():
    """256 rows at three times what is priced, then one row as priced: nobody was wrong."""
    made, large = Corrections(), Batch(256, 100_000)
    for _ in range(50):
        observe(made, "verify", large, 300.0, rounds=2)
        observe(made, "verify", ONE, 100.0, rounds=2)
    before = made.factor("verify", large) / made.factor("verify", ONE)
    assert before == pytest.approx(3.0, rel=0.05)
    observe(made, "verify", ONE, 100.0, rounds=4)
    observe(made, "verify", large, 300.0, rounds=1)
    assert made.factor("verify", large) == pytest.approx(3.0, rel=0.05)


def test_what_refutes_one_part_has_plain_steps_looked_at_once():
    made = Corrections()
    in_turn(made, ONE, 100.0, 100.0, 100.0, rounds=320)
    observe(made, "draft", ONE, 10.0, rounds=3)
    assert made.factor("draft", ONE) == pytest.approx(0.1, rel=0.1)
    assert made.doubted("plain", ONE)
    made.observe("plain", ONE, 100.0, 105.0)
    assert not made.doubted("plain", ONE)
    assert made.factor("plain", ONE) == pytest.approx(1.0, rel=0.1)


def test_short_rounds_have_to_come_in_a_row():
    made = Corrections()
    in_turn(made, ONE, 100.0, 100.0, 100.0, rounds=320)
    for _ in range(3):
        observe(made, "draft", ONE, 3.0, rounds=2)
        observe(made, "draft", ONE, 100.0, rounds=1)
    assert made.relative("draft", ONE) > 0.8


def test_drafting_is_doubted_after_a_long_while_without_it():
    made = Corrections()
    in_turn(made, ONE, 121.0, 121.0, 400.0, rounds=320)
    apart, version = made.relative("draft", ONE), made.version
    assert apart == pytest.approx(400 / 121, rel=0.05)
    made.forget()
    assert made.version > version
    assert made.relative("draft", ONE) == pytest.approx(apart**0.5)
    assert made.factor("plain", ONE) == pytest.approx(1.21, rel=0.02)  # is seen all the time
    in_turn(made, ONE, 121.0, 121.0, 121.0, rounds=32)
    assert made.relative("draft", ONE) == pytest.approx(1.0, abs=0.05)


def test_what_all_parts_share_is_not_doubted():
    """Curves of a busy machine are off alike; a quotient of the parts has to stay what it is."""
    made = Corrections()
    in_turn(made, ONE, 67.0, 67.0, 67.0, rounds=320)
    for _ in range(20):
        made.forget()
    assert made.relative("draft", ONE) == pytest.approx(1.0, abs=0.01)
    assert made.factor("verify", ONE) == pytest.approx(0.67, rel=0.02)


def test_version_grows_only_when_parts_move_apart():
    """A pace that they share makes no choice another one."""
    made = Corrections()
    in_turn(made, ONE, 100.0, 120.0, 110.0, rounds=320)
    version = made.version
    assert version > 0
    observe(made, "plain", ONE, 170.0, rounds=50)
    assert made.version - version <= 8
    assert made.relative("verify", ONE) == pytest.approx(1.2, rel=0.05)
    version = made.version
    in_turn(made, ONE, 100.0, 220.0, 110.0, rounds=32)
    assert made.version > version + 8


def test_disabled_learns_nothing():
    made = Corrections(enabled=False)
    made.observe("plain", ONE, 100.0, 150.0)
    assert made.factor("plain", ONE) == 1.0
    assert made.version == 0


def test_a_full_server_and_one_that_waits_for_the_next_request_are_of_a_kind():
    kinds = [kind_of(Batch(rows, 500 * rows)) for rows in range(1, 34)]
    changes = [rows for rows in range(2, 34) if kinds[rows - 1] != kinds[rows - 2]]
    assert changes == [2, 3, 5, 9, 17, 33]
