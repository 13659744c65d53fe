# SPDX-License-Identifier: Apache-2.0
"""Cost curves: known truths are recovered, noise never gives nonsense, JSON is checked."""

import json
import random

import pytest

from knapspec_vllm.planner.costs import CostModel, CostSample
from knapspec_vllm.planner.curves import Curve, isotonic, median, nonnegative_least_squares
from knapspec_vllm.planner.types import Batch, Mode, Plan

LAYERS, WINDOW = 10, 100


def attention_us(rows, context):
    return 20.0 + 2.0 * rows + 0.05 * context


def mlp_us(rows):
    return 60.0 + 1.0 * rows


def fixed_us(rows):
    return 500.0 + 5.0 * rows


def step_us(rows, context, tokens):
    items_us = attention_us(rows, context) * (1.0 if tokens == 1 else 1.5) + mlp_us(rows)
    return fixed_us(rows) + LAYERS * items_us * (1 + 0.01 * tokens)


def samples(rows_grid=(1, 4, 8), contexts=(50, 400, 2000), tokens=(1, 2, 5, 9), noise=0.0):
    found = []
    for rows in rows_grid:
        for per_row in contexts:
            context = rows * per_row

            def add(kind, tokens_per_row, time_us, rows=rows, context=context):
                time_us *= 1.0 + noise * random.uniform(-1, 1)
                found.append(CostSample(kind, rows, tokens_per_row, context, time_us))

            attention, mlp = attention_us(rows, context), mlp_us(rows)
            window = attention_us(rows, min(context, rows * WINDOW)) + 3.0
            fixed = fixed_us(rows)
            for number in tokens:
                add("step", number, step_us(rows, context, number))
            add("draft_full", 1, fixed + LAYERS * (attention + mlp))
            add("draft_window", 1, fixed + LAYERS * (window + mlp))
            add("draft_no_attention", 1, fixed + LAYERS * mlp)
            add("draft_no_mlp", 1, fixed + LAYERS * attention)
            add("draft_empty", 1, fixed)
    return found


@pytest.fixture(scope="module")
def model():
    return CostModel.fit(samples(), LAYERS, WINDOW)


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("per_row", [60, 100, 1000, 4000])
def test_exact_samples_are_recovered(model, rows, per_row):
    batch = Batch(rows, rows * per_row)
    context = batch.context_tokens
    assert model.item_us("attention", Mode.FULL, batch) == pytest.approx(
        attention_us(rows, context), rel=1e-3
    )
    # A window that covers the whole context is FULL, whatever was measured for it.
    covers = rows * WINDOW >= batch.context_tokens
    window = attention_us(rows, batch.context_tokens if covers else rows * WINDOW)
    window += 0.0 if covers else 3.0
    assert model.item_us("attention", Mode.WINDOW, batch) == pytest.approx(window, rel=1e-3)
    assert model.item_us("mlp", Mode.FULL, batch) == pytest.approx(mlp_us(rows), rel=1e-3)
    assert model.fixed_us(batch) == pytest.approx(fixed_us(rows), rel=1e-3)
    for tokens in (1, 2, 5, 9):
        assert model.step_us(batch, tokens) == pytest.approx(
            step_us(rows, context, tokens), rel=1e-3
        )


def test_draft_is_the_sum_of_its_items(model):
    batch = Batch(4, 1600)
    plan = Plan.parse("skip attn:1 mlp:1-3; window attn:4,5", LAYERS)
    expected = fixed_us(4) + 7 * attention_us(4, 1600) + 7 * mlp_us(4)
    expected += 2 * (attention_us(4, 400) + 3.0)
    assert model.draft_us(plan, batch) == pytest.approx(expected, rel=1e-3)
    assert model.item_us("mlp", Mode.SKIP, batch) == 0.0
    assert model.item_us("attention", Mode.SKIP, batch) == 0.0
    with pytest.raises(ValueError, match="no mode WINDOW"):
        model.item_us("mlp", Mode.WINDOW, batch)
    with pytest.raises(ValueError, match="plan has 3 layers"):
        model.draft_us(Plan.full(3), batch)


def test_nothing_is_interpolated_between_one_and_two_tokens():
    model = CostModel.fit(samples(tokens=(1, 5)), LAYERS, WINDOW)
    batch = Batch(4, 1600)
    at_five = step_us(4, 1600, 5)
    assert model.step_us(batch, 1) == pytest.approx(step_us(4, 1600, 1), rel=1e-3)
    for tokens in (2, 3, 4, 5):
        assert model.step_us(batch, tokens) == pytest.approx(at_five, rel=1e-3)
    assert model.step_us(batch, 6) > at_five


def test_between_measured_lengths_it_is_linear(model):
    batch = Batch(4, 1600)
    middle = (step_us(4, 1600, 5) + step_us(4, 1600, 9)) / 2
    assert model.step_us(batch, 7) == pytest.approx(middle, rel=1e-3)
    with pytest.raises(ValueError, match="at least 1"):
        model.step_us(batch, 0)


@pytest.mark.parametrize("seed", range(10))
def test_noise_stays_positive_and_monotone(seed):
    random.seed(seed)
    model = CostModel.fit(samples(noise=0.4), LAYERS, WINDOW)
    for per_row in (1, 100, 3000, 50_000):
        before = None
        for rows in (1, 2, 3, 4, 7, 8, 12, 16, 100):
            batch = Batch(rows, rows * per_row)
            steps = [model.step_us(batch, tokens) for tokens in range(1, 14)]
            assert steps == sorted(steps)
            items = [model.fixed_us(batch), model.item_us("mlp", Mode.FULL, batch)]
            items += [model.item_us("attention", mode, batch) for mode in Mode]
            assert min(items) >= 0.0
            now = [steps[0], *items]
            if before is not None:
                assert all(a <= b * (1 + 1e-9) for a, b in zip(before, now, strict=True))
            before = now


def test_one_outlier_among_repeats_does_not_matter():
    clean = samples() * 3
    slow = [CostSample(s.kind, s.rows, s.tokens_per_row, s.context_tokens, 50 * s.time_us)
            for s in samples()]  # fmt: skip
    assert CostModel.fit(clean + slow[:40], LAYERS, WINDOW) == CostModel.fit(clean, LAYERS, WINDOW)


def test_few_samples():
    """One batch size, one context, the fewest kinds: still a usable model."""
    kinds = {"step", "draft_full", "draft_no_attention", "draft_empty"}
    few = [s for s in samples((2,), (400,), (1, 5)) if s.kind in kinds]
    model = CostModel.fit(few, LAYERS, WINDOW)
    batch = Batch(2, 800)
    assert model.item_us("attention", Mode.FULL, batch) == pytest.approx(attention_us(2, 800))
    assert model.item_us("mlp", Mode.FULL, batch) == pytest.approx(mlp_us(2))
    assert model.step_us(Batch(64, 64), 1) < 2.0 * model.step_us(batch, 1)


def test_slope_is_borrowed_from_the_nearest_measured_batch():
    mixed = samples((1,), (50, 2000)) + samples((4,), (400,))
    model = CostModel.fit(mixed, LAYERS, WINDOW)
    assert model.item_us("attention", Mode.FULL, Batch(4, 8000)) == pytest.approx(
        attention_us(4, 8000), rel=0.02
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("step", "step samples are needed"),
        ("draft_full", "draft samples are needed"),
    ],
)
def test_missing_kinds_are_named(missing, message):
    with pytest.raises(ValueError, match=message):
        CostModel.fit([s for s in samples() if s.kind != missing], LAYERS, WINDOW)


def test_steps_of_one_length_only_are_refused():
    with pytest.raises(ValueError, match="at least one larger"):
        CostModel.fit(samples(tokens=(1,)), LAYERS, WINDOW)


@pytest.mark.parametrize(
    "arguments",
    [("draft_half", 1, 1, 1, 1.0), ("step", 0, 1, 1, 1.0), ("step", 1, 1, 1, 0.0),
     ("step", 1, 1, 1, float("nan"))],
)  # fmt: skip
def test_impossible_samples(arguments):
    with pytest.raises(ValueError, match=r"cost sample|positive"):
        CostSample(*arguments)


def test_json_round_trip(model):
    assert CostModel.from_json(json.loads(json.dumps(model.to_json()))) == model


@pytest.mark.parametrize(
    "change",
    [{"schema": 0}, {"steps": []}, {"mlp": None}, {"num_layers": 0}, {"fixed": {"rows": [1]}},
     {"mlp": {"rows": [1], "base_us": [-1.0], "per_row_token_us": [0.0]}},
     {"mlp": {"rows": [2, 1], "base_us": [1.0, 1.0], "per_row_token_us": [0.0, 0.0]}}],
)  # fmt: skip
def test_foreign_json_is_refused(model, change):
    with pytest.raises(ValueError, match="not a stored cost model"):
        CostModel.from_json({**model.to_json(), **change})


def test_curve_extrapolates_one_doubling_then_holds():
    curve = Curve((1, 4), (10.0, 16.0), (0.0, 0.0))
    assert curve.at(8, 0) == pytest.approx(24.0)
    assert curve.at(64, 0) == pytest.approx(24.0)
    assert Curve((4, 8), (10.0, 20.0), (0.0, 0.0)).at(1, 0) == pytest.approx(10.0)


def test_a_token_of_context_keeps_its_price_beyond_the_measured_rows():
    """It used to be that of twice the largest batch for all rows together, however many."""
    curve = Curve((1, 4), (10.0, 16.0), (2.0, 5.0))
    assert curve.at(4, 400) - curve.at(4, 0) == pytest.approx(5.0 * 100)
    assert curve.at(8, 800) - curve.at(8, 0) == pytest.approx(9.0 * 100)  # the last slope holds
    for rows in (9, 16, 256):
        more = curve.at(rows, 100 * rows) - curve.at(rows, 0)
        assert more == pytest.approx(9.0 * 100 * rows / 8)
    alone = Curve((4,), (10.0,), (2.0,))
    assert alone.at(8, 800) - alone.at(8, 0) == pytest.approx(2.0 * 100 * 8 / 4)


def test_isotonic_and_median():
    assert isotonic([1.0, 3.0, 2.0, 5.0]) == [1.0, 2.5, 2.5, 5.0]
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert median([5.0, 1.0, 3.0]) == 3.0
    assert median([1.0, 3.0]) == 2.0


def test_least_squares_respects_zero():
    # Unconstrained: x = (3, -1). With x >= 0 the second unknown stays at 0.
    found = nonnegative_least_squares([[1.0, 0.0], [1.0, 1.0]], [3.0, 2.0])
    assert found[1] == 0.0
    assert 2.0 <= found[0] <= 3.0
    assert nonnegative_least_squares([[1.0, 0.0], [1.0, 1.0]], [2.0, 5.0]) == pytest.approx([2, 3])
