# SPDX-License-Identifier: Apache-2.0
"""Plans and their text; frontiers and their JSON."""

import json
import random
import subprocess
import sys

import pytest

from knapspec_vllm.planner.types import Batch, Choice, Frontier, Mode, Plan, PlanEstimate


def test_parse_places_every_mode():
    plan = Plan.parse("skip attn:1,3-4 mlp:0; window attn:2", 6)
    full, window, skip = Mode.FULL, Mode.WINDOW, Mode.SKIP
    assert [plan.attention(i) for i in range(6)] == [full, skip, window, skip, skip, full]
    assert [plan.mlp(i) for i in range(6)] == [skip, full, full, full, full, full]
    assert plan.count("attention", skip) == 3
    assert plan.count("attention", window) == 1
    assert plan.count("mlp", full) == 5
    assert plan.describe() == (
        "skips 3 of 6 attentions, windows 1 of 6 attentions, skips 1 of 6 MLPs"
    )


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "skip attn:3,7-9 mlp:5",
        "window attn:*",
        "skip mlp:*; window attn:0-2,5",
        "skip attn:0",
    ],
)
def test_text_round_trip(text):
    plan = Plan.parse(text, 12)
    assert Plan.parse(plan.to_text(), 12) == plan


def test_random_plans_round_trip():
    for _ in range(200):
        layers = random.randint(1, 40)
        modes = []
        for _ in range(layers):
            modes += [Mode(random.randint(0, 2)), random.choice([Mode.FULL, Mode.SKIP])]
        plan = Plan(tuple(modes))
        assert Plan.parse(plan.to_text(), layers) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty plan text"),
        ("skip", "cannot read group"),
        ("drop attn:1", "cannot read group 'drop attn:1'"),
        ("skip attn:1;", "cannot read group ''"),
        ("skip head:1", "cannot read 'head:1'"),
        ("skip attn:", "cannot read 'attn:'"),
        ("skip attn:x", "cannot read layers 'x'"),
        ("skip attn:1-", "cannot read layers '1-'"),
        ("skip attn:4", "lie in 0..3"),
        ("skip attn:2-1", "must ascend"),
        ("window mlp:1", "an MLP has no window"),
        ("skip attn:1; window attn:1", "attn 1 is named twice"),
    ],
)
def test_bad_text_names_the_part(text, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Plan.parse(text, 4)


def test_window_mlp_is_refused():
    with pytest.raises(ValueError, match="MLP of layer 1 has mode WINDOW"):
        Plan((Mode.FULL, Mode.FULL, Mode.FULL, Mode.WINDOW))


def test_key_is_stable_across_processes():
    text = "skip attn:1 mlp:2-3"
    code = f"from knapspec_vllm.planner.types import Plan; p = Plan.parse({text!r}, 5)\n"
    code += "import sys; sys.stdout.write(p.key + ' ' + str(hash(p)))"
    key, hashed = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    plan = Plan.parse(text, 5)
    assert (plan.key, str(hash(plan))) == (key, hashed)
    assert len(key) == 8
    assert plan.key != Plan.full(5).key


def test_full_plan():
    assert Plan.full(3).is_full
    assert Plan.full(3).to_text() == "full"
    assert not Plan.parse("window attn:0", 3).is_full


def test_frontier_json_round_trip():
    estimates = (
        PlanEstimate(Plan.parse("skip mlp:1", 3), 0.98, 30, 32),
        PlanEstimate(Plan.parse("skip mlp:1; window attn:*", 3), 0.8, 20, 32),
    )
    frontier = Frontier(estimates, context_tokens=4096, rows=4, source="solved")
    assert Frontier.from_json(json.loads(json.dumps(frontier.to_json()))) == frontier
    empty = Frontier((), 0, 1, "stored")
    assert Frontier.from_json(empty.to_json()) == empty


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0},
        {"rows": "1"},
        {"context_tokens": -1},
        {"source": "guessed"},
        {"num_layers": 1},
        {"estimates": "full"},
        {"estimates": [{"plan": "full"}]},
        {"estimates": [{"plan": "full", "cosine": 0.5, "hits": 3, "trials": 2}]},
        {"estimates": [{"plan": "full", "cosine": 7.0, "hits": 2, "trials": 2}]},
        {"estimates": None},
    ],
)
def test_foreign_frontier_is_refused(change):
    estimate = PlanEstimate(Plan.parse("skip mlp:1", 3), 0.98, 30, 32)
    good = Frontier((estimate,), 4096, 4, "solved").to_json()
    with pytest.raises(ValueError, match="not a stored frontier"):
        Frontier.from_json({**good, **change})


@pytest.mark.parametrize("obj", [None, [], "x", {}, 3])
def test_foreign_objects_are_refused(obj):
    with pytest.raises(ValueError, match="not a stored frontier"):
        Frontier.from_json(obj)


def test_batch_and_choice_check_themselves():
    with pytest.raises(ValueError, match="rows >= 1"):
        Batch(0, 10)
    with pytest.raises(ValueError, match="exactly when"):
        Choice(None, 2, 1.0, "")
    with pytest.raises(ValueError, match="exactly when"):
        Choice(Plan.full(1), 0, 1.0, "")
