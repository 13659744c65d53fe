# SPDX-License-Identifier: Apache-2.0
"""Statistics on numbers made by hand, nested counters, and that files bring back what was saved."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest

from knapspec_vllm.bench.arms import UsageError
from knapspec_vllm.bench.counters import difference, total
from knapspec_vllm.bench.figures import (
    CSV_FILE,
    Figures,
    all_figures,
    figures,
    save,
    spread,
    summaries,
)
from knapspec_vllm.bench.provenance import without_folders
from knapspec_vllm.bench.results import FILE, Cell, Results
from knapspec_vllm.bench.tables import summary, tables
from tests.helpers_bench import grid_results, make_round, measured, stats_state


def test_ratios_are_formed_round_by_round() -> None:
    # The machine slows down: both fall, their ratio does not.
    plain = measured("plain", [100.0, 50.0, 25.0])
    row = figures(measured("knapspec", [110.0, 60.0, 25.0]), plain)
    assert row.ratio == pytest.approx(1.1)
    assert row.ratio_p20 == pytest.approx(1.0 + 0.4 * 0.1)
    assert row.ratio_p80 == pytest.approx(1.1 + 0.6 * 0.1)
    assert row.ratio_of_minima == pytest.approx(1.1)
    assert row.ratio_full_batch == pytest.approx(1.1)
    assert row.tpot_ratio == pytest.approx(1.1)
    assert (row.tokens_per_second, row.tokens_per_second_min) == (60.0, 25.0)
    assert row.tpot_ms == pytest.approx(1000 / 60)
    assert row.ttft_ms == 250.0
    assert (row.identical, row.compared) == (6, 6)
    assert row.output_tokens == 306


def test_plain_has_no_ratio_but_a_second_plain_has() -> None:
    plain = measured("plain", [10.0])
    assert figures(plain, plain).ratio is None
    assert figures(measured("again", [9.0]), plain).ratio == pytest.approx(0.9)


def test_memory_is_compared_with_plain() -> None:
    plain = measured("plain", [10.0], memory_bytes=3 << 30)
    row = figures(measured("knapspec", [10.0], memory_bytes=(3 << 30) + (50 << 20)), plain)
    assert (row.memory_mib, row.memory_added_mib) == (3122, 50)
    assert figures(measured("knapspec", [10.0]), plain).memory_added_mib is None
    text = tables([figures(plain, plain), row])
    assert "memory 3,122 MiB, +50 MiB over plain" in text
    assert "memory 3,072 MiB\n" in text


def test_spread() -> None:
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)


def test_what_knapspec_counted() -> None:
    stats = {
        "rounds": 20, "drafting_rounds": 15, "draft_tokens": 40, "accepted_tokens": 30,
        "drafted_by_position": [20, 12, 8], "predicted_plain_us": 2400.0,
        "predicted_round_us": 2000.0,
    }  # fmt: skip
    plain = measured("plain", [100.0, 50.0])
    row = figures(measured("knapspec", [114.0, 57.0], knapspec=stats_state(**stats)), plain)
    assert row.predicted == pytest.approx(1.2)
    assert row.realised == pytest.approx(1.14)
    assert row.realised_over_predicted == pytest.approx(0.95)
    # A round that solved for plans counts in the ratio, and not in what predictions are about.
    rounds = (make_round(120.0), make_round(40.0, solves=1))
    solved = dataclasses.replace(measured("knapspec", [1.0]), rounds=rounds)
    with_solve = figures(solved, plain)
    assert with_solve.ratio == pytest.approx((1.2 + 0.8) / 2)
    assert with_solve.realised == pytest.approx(1.2)
    alone = dataclasses.replace(solved, rounds=rounds[1:])
    assert figures(alone, plain).realised == pytest.approx(0.4)
    assert (row.acceptance, row.accepted_length, row.drafting) == (0.75, 2.5, 0.75)


@pytest.mark.parametrize("state", [None, {}, stats_state(), stats_state(rounds=0, draft_tokens=0)])
def test_missing_counters_are_absent(state: dict | None) -> None:
    row = figures(measured("knapspec", [1.0], knapspec=state), measured("plain", [1.0]))
    assert row.predicted is row.realised_over_predicted is row.acceptance is None
    assert row.accepted_length is row.drafting is None


def test_vllm_counters_serve_other_methods() -> None:
    counters = {"num_drafts": 10, "num_draft_tokens": 50, "num_accepted_tokens": 20}
    row = figures(measured("ngram", [1.0], counters=counters), None)
    assert (row.acceptance, row.accepted_length) == (0.4, 3.0)


def test_identity_is_judged_at_temperature_zero_only() -> None:
    plain = measured("plain", [1.0])
    ours = measured("knapspec", [1.0])
    other = make_round(1.0, outputs=("a", "c"))
    row = figures(type(ours)("x", ours.cell, 0, (other,)), plain)
    assert (row.identical, row.compared) == (1, 2)
    warm = Cell(1, 64, 0.7)
    row = figures(measured("x", [1.0], warm), measured("plain", [1.0], warm))
    assert row.identical is row.compared is None


def test_summary() -> None:
    cells = [Cell(1, 64), Cell(2, 64), Cell(4, 64)]
    rows: list[Figures] = []
    for cell, speed in zip(cells, (1.21, 1.0, 0.9), strict=True):
        plain = measured("plain", [1.0], cell)
        rows += [figures(plain, plain), figures(measured("knapspec", [speed], cell), plain)]
    (entry,) = summaries(rows)
    assert entry.geometric_mean == pytest.approx(math.cbrt(1.21 * 0.9))
    assert (entry.worst.batch, entry.worst.ratio) == (4, pytest.approx(0.9))
    assert (entry.slower, entry.cells) == (1, 3)


def test_every_arm_is_compared_with_the_plain_beside_it() -> None:
    """A second group of arms has a baseline of its own, measured when the machine was slower."""
    results = Results({}, {}, {name: {} for name in ("plain", "a", "b", "c")}, cells=[Cell(1, 64)])
    results.measurements = [
        measured("plain", [100.0], session=0), measured("a", [110.0], session=0),
        measured("plain", [50.0], session=1), measured("b", [55.0], session=1),
        measured("c", [90.0], session=2),
    ]  # fmt: skip
    rows = {row.arm: row for row in all_figures(results)}
    assert rows["plain"].tokens_per_second == 75.0, "of all its rounds"
    assert rows["a"].ratio == rows["b"].ratio == pytest.approx(1.1)
    assert (rows["c"].ratio, rows["c"].alternated) == (pytest.approx(0.9), False)
    assert "did not take turns" in tables(list(rows.values()))


def test_starts_of_an_engine_are_one_figure_and_their_ratios_stand_beside_it() -> None:
    results = Results({}, {}, {name: {} for name in ("plain", "a")}, cells=[Cell(1, 64)])
    results.measurements = [
        measured("plain", [100.0, 100.0], session=0), measured("a", [110.0, 112.0], session=0),
        measured("plain", [50.0, 50.0], session=1), measured("a", [48.0, 47.0], session=1),
    ]  # fmt: skip
    plain, row = all_figures(results)
    assert plain.ratio_by_start == ()
    assert row.rounds == 4
    assert row.ratio_by_start == (pytest.approx(1.11), pytest.approx(0.95))
    assert row.ratio == pytest.approx((1.10 + 0.96) / 2)
    assert "by start: 1.110x 0.950x" in tables([plain, row])


def test_difference_of_nested_counters() -> None:
    before = {"rounds": 5, "phase_us": {"draft": 1.5}, "drafted": [4, 2], "plan": "old", "on": True}
    after = {
        "rounds": 8, "phase_us": {"draft": 4.0, "solve": 2.0}, "drafted": [9, 4, 1], "plan": "new",
        "on": True, "new": {"a": [1]}, "none": None,
    }  # fmt: skip
    assert difference(after, before) == {
        "rounds": 3, "phase_us": {"draft": 2.5, "solve": 2.0}, "drafted": [5, 2, 1],
        "plan": "new", "on": True, "new": {"a": [1]}, "none": None,
    }  # fmt: skip
    assert difference(after, None) == after
    assert difference({}, before) == {}


def test_total_of_nested_counters() -> None:
    first = {"rounds": 5, "by": [1], "reasons": {"a": 1}, "plan": "x"}
    second = {"rounds": 2, "by": [1, 1], "reasons": {"b": 2}, "plan": "y"}
    whole = {"rounds": 7, "by": [2, 1], "reasons": {"a": 1, "b": 2}, "plan": "y"}
    assert total(first, second) == whole
    assert total({}, first) == total(first, {}) == total(None, first) == first


def test_files_bring_back_what_was_saved(tmp_path: Path) -> None:
    results = grid_results()
    rows = save(results, tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded == results
    assert all_figures(loaded) == rows
    assert len(rows) == 4 * 8
    with (tmp_path / CSV_FILE).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], int(line["batch"])) for line in lines] == [(r.arm, r.batch) for r in rows]
    assert float(lines[2]["ratio"]) == pytest.approx(rows[2].ratio)
    assert lines[0]["ratio"] == ""
    assert json.loads((tmp_path / FILE).read_text())["figures"][2]["ratio"] == rows[2].ratio
    assert sorted(path.name for path in tmp_path.iterdir()) == [CSV_FILE, FILE]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99}'])
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UsageError, match=FILE):
        Results.load(tmp_path)
    with pytest.raises(UsageError, match="there is no"):
        Results.load(tmp_path / "elsewhere")


def test_tables_and_summary_are_readable() -> None:
    results = grid_results()
    rows = all_figures(results)
    text = tables(rows)
    assert text.count("identical") == 8
    assert "1.204x" in text
    assert "last decision: best" in text
    assert max(map(len, text.splitlines())) <= 145
    results.cells.append(Cell(64, 64))
    closing = summary(rows, results)
    assert "left out: suffix, needs a package" in closing
    assert "not measured yet: 4 of 36" in closing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("knapspec bench /home/me/models/smol --out /tmp/x", "knapspec bench smol --out x"),
        ('{"model": "/data/draft model/w"}', '{"model": "draft model/w"}'),
        ("~/models/smol", "smol"),
        ("org/model at 3.5 tokens/s, 1/2, http://host/page", None),
        ("a / b", None),
    ],
)
def test_folders_of_the_machine_are_cut(text: str, expected: str | None) -> None:
    assert without_folders(text) == (text if expected is None else expected)
    assert without_folders({"a": [text]}) == {"a": [text if expected is None else expected]}
