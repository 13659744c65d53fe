# SPDX-License-Identifier: Apache-2.0
"""`knapspec bench` from its command line, over stand-ins for engines, tokenizer and model.

Over 300 lines because every wrong argument of the command has its line here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from knapspec_vllm import cli
from knapspec_vllm.bench import command
from knapspec_vllm.bench.arms import DEFAULT, KNAPSPEC_ARMS, NAMES, UsageError, make_arms
from knapspec_vllm.bench.capacity import GIB, engines_at_once, kv_bytes, kv_space_gib
from knapspec_vllm.bench.figures import save
from knapspec_vllm.bench.grid import Protocol
from knapspec_vllm.bench.results import FILE, Results
from tests.helpers_bench import CONFIG, FakeEngine, FakeTokenizer, grid_results

PLOTS = ("speedup-heatmap.png", "predicted.png", "breakdown.png", "acceptance.png")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the command with a stand-in per arm; the speeds are of plain, then of the others."""
    made: list[FakeEngine] = []

    def engine(name: str, settings: dict, environment: dict, timeout: float) -> FakeEngine:
        speeds = {"plain": 100.0, "knapspec": 120.0}
        made.append(FakeEngine(name, {**settings, "speed": speeds.get(name, 90.0)}, environment))
        return made[-1]

    monkeypatch.setattr(command, "Engine", engine)
    monkeypatch.setattr(
        command, "_tokenizer_and_config", lambda model, args: (FakeTokenizer(), CONFIG)
    )

    def run(*arguments: str) -> int:
        made.clear()
        return cli.main(["bench", *arguments])

    run.made = made  # type: ignore[attr-defined]
    return run


SMALL = ("--batch", "1", "2", "--context", "64", "--rounds", "2", "--tokens", "4", "--at-once", "9")


def test_a_small_grid(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arms = ("--arms", "knapspec", "declining", "--arm", "again=null")
    assert bench("org/model", *SMALL, *arms, "--out", str(out), "--check", "1.1") == 0
    printed = capsys.readouterr().out
    assert "cell 2 of 2: batch 2, context 64" in printed
    assert "round 2 of 2: plain 100.0" in printed
    assert "1.200x" in printed
    results = Results.load(out)
    assert list(results.arms) == ["plain", "knapspec", "declining", "again"]
    assert results.settings["model"] == "org/model"
    assert {engine.name: engine.settings.get("speculative_config") for engine in bench.made}.keys()
    for name in (*PLOTS, "strategies.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / FILE).read_text()
    assert str(tmp_path) not in text
    assert "knapspec-store-" not in text, "the store's folder is this machine's business"

    assert bench("org/model", *SMALL, *arms, "--out", str(out)) == 2
    assert "--resume" in capsys.readouterr().err
    # Nothing is missing: nothing is started.
    assert bench("org/model", *SMALL, *arms, "--out", str(out), "--resume", "--check", "1.3") == 1
    assert "--check: 1.200x is below 1.3x at batch 1" in capsys.readouterr().out
    assert bench.made == []
    # One more cell, one more arm.
    more = ("--arm", "wide={}", "--batch", "1", "2", "4")
    assert bench("org/model", *SMALL, *arms, *more, "--out", str(out), "--resume") == 0
    assert len(Results.load(out).measurements) == 2 * 4 + 5 + 2 * 2
    assert bench("org/model", *SMALL, "--rounds", "3", *arms, "--out", str(out), "--resume") == 2
    assert "--resume: setting rounds was 2, now it is 3" in capsys.readouterr().err


def test_engines_are_as_shipped(bench: Any, tmp_path: Path) -> None:
    one = ("--batch", "1", "--context", "64", "--rounds", "1", "--tokens", "4", "--at-once", "9")
    out = str(tmp_path / "a")
    assert bench("m", *one, "--arms", "knapspec", "paper", "--out", out) == 0
    plain, knapspec, paper = bench.made
    assert set(plain.settings) - {"gpu_memory_utilization"} == {"model", "max_model_len", "speed"}
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in plain.environment
    ours = dict(knapspec.settings["speculative_config"])
    store = ours.pop("store_dir")
    assert ours == {"method": "knapspec", "num_speculative_tokens": 8}
    assert paper.settings["speculative_config"] == {
        **ours, "store_dir": store, "objective": "paper", "windows": False,
    }  # fmt: skip
    out = str(tmp_path / "b")
    given = ("--eager", "--engine-args", '{"dtype": "float32"}', "--settings", '{"bins": 8}')
    assert bench("m", *one, *given, "--arms", "knapspec", "--out", out) == 0
    plain, knapspec = bench.made
    assert plain.settings["enforce_eager"] is True
    assert plain.settings["dtype"] == "float32"
    assert knapspec.settings["speculative_config"]["bins"] == 8


def test_an_interrupted_run_keeps_whole_cells(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    turn, cells = FakeEngine.turn, []

    def interrupted(self: FakeEngine, request: dict) -> dict | None:
        cells.append(request["batch"])
        if request["batch"] == 2 and self.name == "knapspec" and sum(b == 2 for b in cells) > 3:
            raise KeyboardInterrupt
        return turn(self, request)

    monkeypatch.setattr(FakeEngine, "turn", interrupted)
    out = tmp_path / "out"
    line = ("m", *SMALL, "--arms", "knapspec", "--out", str(out))
    assert bench(*line) == 130
    assert [(m.arm, m.cell.batch) for m in Results.load(out).measurements] == [
        ("plain", 1), ("knapspec", 1),
    ]  # fmt: skip
    assert "--resume goes on" in capsys.readouterr().out
    monkeypatch.setattr(FakeEngine, "turn", turn)
    assert bench(*line, "--resume") == 0
    assert [m.cell.batch for m in Results.load(out).measurements] == [1, 1, 2, 2]


def test_report_draws_everything_from_the_file(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    save(grid_results(), tmp_path)
    assert bench("--report", str(tmp_path)) == 0
    assert bench.made == []
    for name in (*PLOTS, "strategies.png"):
        assert (tmp_path / name).stat().st_size > 10_000, name
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert bench("--report", str(tmp_path), "--check", "1.5") == 1


def test_report_without_predictions_or_drafts(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = grid_results()
    results.measurements = [m for m in results.measurements if m.arm in ("plain", "declining")]
    save(results, tmp_path)
    assert bench("--report", str(tmp_path)) == 0
    assert not (tmp_path / "strategies.png").exists(), "two arms have nothing to compare"
    results.measurements = []
    save(results, tmp_path)
    assert bench("--report", str(tmp_path)) == 0, "interrupted in its first cell"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "MODEL is missing"),
        (("m", "--report", "x"), "--report runs nothing"),
        (("--report", "no-such-folder"), "no-such-folder: there is no bench.json"),
        (("m", "--arms", "eagle"), "--arms eagle: known arms are plain"),
        (("m", "--arms", "plain"), "--arms: nothing to compare with plain"),
        (("m", "--arm", "x"), "--arm x: write NAME=JSON"),
        (("m", "--arm", "x={"), "--arm x: not JSON"),
        (("m", "--arm", "x=3"), "--arm x: a JSON object or null is needed"),
        (("m", "--arm", "ngram={}"), "--arm ngram: the name is taken"),
        (
            ("m", "--arm", 'x={"method": null, "bins": 4}'),
            '--arm x: a plain engine ("method": null)',
        ),
        (("m", "--arm", 'x={"engine_args": 3}'), "--arm x: engine_args is a JSON object, not 3"),
        (("m", "--tokens", "1"), "--tokens 1"),
        (("m", "--starts", "6"), "--starts 6 needs as many --rounds"),
        (("m", "--arms", "ngram", "--check", "1"), "--check judges the arm knapspec"),
        (("m", "--engine-args", '{"speculative_config": {}}'), "--engine-args: speculative_config"),
        (("m", "--engine-args", '{"max_model_len": 100}'), "max_model_len is 100"),
        (("m", "--settings", '{"store_dir": "x"}'), "--store"),
        (("m", "--workload", "chat", "--context", "10"), "--context 10 is too short"),
    ],
)
def test_wrong_arguments_are_one_line(
    bench: Any, capsys: pytest.CaptureFixture, tmp_path: Path, arguments: tuple, words: str
) -> None:
    out = () if "--report" in arguments else ("--out", str(tmp_path / "out"))
    assert bench(*arguments, *out) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("m", "--batch", "0"), "--batch: 0 is not a positive number"),
        (("m", "--warm-up", "-1"), "--warm-up"),
        (("m", "--temperature", "-1"), "--temperature: -1 is not a temperature"),
        (("m", "--rounds", "many"), "--rounds: many is not a whole number"),
        (("m", "--settings", "["), "--settings: not JSON"),
        (("m", "--workload", "novels"), "--workload: invalid choice"),
        (("m", "--turn", "soon"), "--turn: soon is not a time in seconds"),
    ],
)
def test_wrong_values_name_the_option(
    capsys: pytest.CaptureFixture, arguments: tuple, words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_turns_need_the_engine_core_in_the_process(
    bench: Any, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("m", *SMALL, "--arms", "knapspec", "--turn", "0.5", "--out", str(tmp_path / "out"))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    assert bench(*line) == 2
    assert "set VLLM_ENABLE_V1_MULTIPROCESSING=0" in capsys.readouterr().err
    assert bench.made == []
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert bench(*line, "--rounds", "2", "--starts", "2") == 0
    found = Results.load(tmp_path / "out").measurements
    assert {len(m.rounds) for m in found} == {1}
    assert sorted({m.session for m in found}) == [0, 1]


def test_a_failing_arm_ends_the_run_in_one_line(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the engine that stands in for vLLM's.
    monkeypatch.setattr("knapspec_vllm.cli.check_engine_args", lambda given: None)
    settings = ("--engine-args", '{"behaviour": "refuses"}')
    assert bench("m", *SMALL, *settings, "--arms", "knapspec", "--out", str(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("knapspec: arm plain: unknown setting")


def test_arms() -> None:
    arms, _ = make_arms(
        NAMES, ["eagle=" + json.dumps({"method": "eagle", "model": "x"})], {"bins": 4}
    )
    configs = {arm.name: arm.speculative for arm in arms}
    assert next(iter(configs)) == "plain"
    assert configs["plain"] is None
    assert configs["eagle"] == {"method": "eagle", "model": "x"}
    for name, own in KNAPSPEC_ARMS.items():
        base = {"method": "knapspec", "num_speculative_tokens": 8, "bins": 4}
        assert configs[name] == {**base, **own}
    assert configs["swift"]["strategy"] == "swift"
    assert configs["declining"]["min_speedup"] > 1e6


def test_arms_with_engine_args_of_their_own(bench: Any, tmp_path: Path) -> None:
    graphs = {"compilation_config": {"cudagraph_mode": "FULL"}}
    own = {"method": None, "environment": {"V2": 0}, "engine_args": graphs}
    arms, _ = make_arms(
        [], ["v1=" + json.dumps(own), "full=" + json.dumps({"engine_args": graphs})]
    )
    plain, v1, full = arms
    assert plain.described() == {"speculative_config": None}
    assert v1.described() == {
        "speculative_config": None,
        "environment": {"V2": "0"},
        "engine_args": graphs,
    }
    assert full.is_knapspec
    assert full.engine_args == graphs
    options = ("--arms", "knapspec", "--arm", "v1=" + json.dumps(own), "--out", str(tmp_path))
    assert bench("m", *SMALL, *options) == 0
    engines = {engine.name: engine for engine in bench.made}
    assert engines["v1"].settings["compilation_config"] == graphs["compilation_config"]
    assert engines["v1"].environment["V2"] == "0"
    assert "compilation_config" not in engines["plain"].settings
    assert "V2" not in engines["plain"].environment


def test_suffix_is_left_out_where_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from knapspec_vllm.bench import arms as module

    monkeypatch.setattr(module, "SUFFIX_PACKAGE", "no_such_package_at_all")
    arms, left_out = make_arms(DEFAULT)
    assert [arm.name for arm in arms] == ["plain", "ngram", "knapspec"]
    assert "arctic-inference" in left_out["suffix"]
    with pytest.raises(UsageError, match="suffix needs a package"):
        make_arms(["suffix"])
    monkeypatch.setattr(module, "SUFFIX_PACKAGE", "json")
    arms, left_out = make_arms(DEFAULT)
    assert [arm.name for arm in arms] == list(DEFAULT)
    assert left_out == {}


def test_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    from knapspec_vllm.bench import capacity

    # 2 layers x K and V x 1 head of 32 x 2 bytes.
    assert kv_bytes(CONFIG, 3, 1000) == 2 * 2 * 32 * 2 * 3 * 1256
    assert kv_bytes(CONFIG, 3, 1000, "float32") == 2 * kv_bytes(CONFIG, 3, 1000)
    assert (kv_space_gib(5), kv_space_gib(2 * GIB)) == (1, 3)
    monkeypatch.setattr(capacity, "on_gpu", lambda: False)
    monkeypatch.setattr(capacity, "available_memory", lambda: 24 * GIB)
    assert engines_at_once(4, GIB, 5) == 4
    assert engines_at_once(9, GIB, 5) == 4
    assert engines_at_once(9, None, 5) == 2
    assert engines_at_once(9, 100 * GIB, 5) == 2


def test_defaults_are_what_the_help_says() -> None:
    arguments = cli.make_parser().parse_args(["bench", "m"])
    protocol = Protocol()
    for name in ("rounds", "warm_up", "tokens", "requests", "natural_end"):
        assert getattr(arguments, name) == getattr(protocol, name)
