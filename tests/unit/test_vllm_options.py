# SPDX-License-Identifier: Apache-2.0
"""Options of vLLM in our commands' arguments and files: read as vLLM reads them, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from knapspec_vllm import cli
from knapspec_vllm.commands.output import under_way
from knapspec_vllm.commands.vllm_options import check_engine_args, serve_options
from knapspec_vllm.doctor import examine

CONFIG = """\
model: some/model
port: 9999
api-key: secret
max_model_len: 512
enable-prefix-caching: false
data-parallel-size: 2
speculative-config: {method: knapspec, num_speculative_tokens: 4}
"""


def config(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_a_servers_file_gives_the_engines_options(tmp_path: Path) -> None:
    assert serve_options(config(tmp_path, CONFIG)) == {
        "max_model_len": 512,
        "enable_prefix_caching": False,
        "speculative_config": {"method": "knapspec", "num_speculative_tokens": 4},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-modle-len: 512\n", "'max-modle-len', which this vLLM does not know: write max-model"),
        ("- a\n- b\n", "is not a mapping"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """A key that were left out would have curves measured of another server."""
    with pytest.raises(ValueError, match=words):
        serve_options(config(tmp_path, text))


def test_misspelt_engine_arguments_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="'dtyp', which this vLLM does not know: write dtype"):
        check_engine_args({"dtyp": "float32"})
    assert cli.main(["plan", "no-such-model", "--engine-args", '{"dtyp": "float32"}']) == 1
    assert "write dtype" in capsys.readouterr().err
    (found,) = [c for c in examine("m", {"dtyp": "float32"}) if c.name == "model"]
    assert found.status == "refused"
    assert "write dtype" in found.reason


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ImportError("No module named 'vllm'"), 1, "No module named 'vllm'"),
    ],
    ids=["interrupt", "no vLLM"],
)
def test_how_a_command_ends(
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def fails(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_doctor", fails)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == f"knapspec: {words}\n"


def test_progress_is_told_to_files_in_lines(capsys: pytest.CaptureFixture) -> None:
    with under_way("measuring"):
        pass
    assert capsys.readouterr().err == "knapspec: measuring ...\nknapspec: measuring: 0 s\n"
    with pytest.raises(ValueError, match="no"), under_way("measuring"):
        raise ValueError("no")
    assert capsys.readouterr().err == "knapspec: measuring ...\n"


def test_progress_counts_on_a_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import time

    from knapspec_vllm.commands import output

    monkeypatch.setattr(output, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with under_way("measuring"):
        time.sleep(0.2)
    told = capsys.readouterr().err
    assert told.count("\rknapspec: measuring ... 0 s") > 3
    assert told.endswith(" s\n")
