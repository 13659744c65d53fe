# SPDX-License-Identifier: Apache-2.0
"""`knapspec top` from pages: what it computes, what it draws, and what it says without a server."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from rich.console import Console

from knapspec_vllm.cli import main
from knapspec_vllm.commands.server_metrics import Reading, between, summary
from knapspec_vllm.commands.top_view import bar, view

LABELS = 'model_name="m",engine="0"'


def page(rounds: int = 100, drafted: int = 400, accepted: int = 300, tokens: int = 1000) -> str:
    return f"""\
# TYPE knapspec:enabled gauge
knapspec:enabled{{{LABELS}}} 1
# TYPE knapspec:rounds counter
knapspec:rounds_total{{{LABELS}}} {rounds}
# TYPE knapspec:drafting_rounds counter
knapspec:drafting_rounds_total{{{LABELS}}} {rounds * 3 // 4}
# TYPE knapspec:skipped_steps counter
knapspec:skipped_steps_total{{{LABELS},reason="no gain"}} {rounds // 4}
# TYPE knapspec:draft_tokens counter
knapspec:draft_tokens_total{{{LABELS},context="0-1023"}} {drafted}
# TYPE knapspec:accepted_tokens counter
knapspec:accepted_tokens_total{{{LABELS},context="0-1023"}} {accepted}
# TYPE knapspec:round_seconds counter
knapspec:round_seconds_total{{{LABELS},source="observed",what="round"}} {rounds / 10}
knapspec:round_seconds_total{{{LABELS},source="observed",what="plain"}} {rounds / 5}
# TYPE knapspec:phase_seconds counter
knapspec:phase_seconds_total{{{LABELS},phase="verify"}} {rounds / 20}
knapspec:phase_seconds_total{{{LABELS},phase="draft"}} {rounds / 20}
# TYPE knapspec:plan_layers gauge
knapspec:plan_layers{{{LABELS}}} 30
# TYPE knapspec:plan_skipped_blocks gauge
knapspec:plan_skipped_blocks{{{LABELS},kind="attention"}} 12
knapspec:plan_skipped_blocks{{{LABELS},kind="mlp"}} 6
# TYPE knapspec:draft_tokens_per_pos counter
knapspec:draft_tokens_per_pos_total{{{LABELS},position="0"}} {drafted}
# TYPE knapspec:accepted_tokens_per_pos counter
knapspec:accepted_tokens_per_pos_total{{{LABELS},position="0"}} {accepted}
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{{LABELS}}} {tokens}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{LABELS}}} 2
"""


def drawn(facts: dict) -> str:
    console = Console(record=True, width=100, file=None, quiet=False)
    with console.capture() as captured:
        console.print(view(facts))
    return captured.get()


def test_summary_between_two_readings() -> None:
    before = Reading.parse(page(), at=10.0)
    now = Reading.parse(page(rounds=140, drafted=500, accepted=350, tokens=1500), at=15.0)
    facts = summary(before, now)
    assert facts["tokens_per_second"] == pytest.approx(100.0)
    assert facts["acceptance"] == pytest.approx(0.5)
    assert facts["acceptance_by_position"] == [pytest.approx(0.5)]
    assert facts["rounds"] == 40
    assert facts["speedup"] == pytest.approx(2.0)
    assert facts["declined"] == {"no gain": 10}
    assert facts["phase_seconds"] == {"verify": pytest.approx(2.0), "draft": pytest.approx(2.0)}
    assert facts["plan"]["skipped_attention"] == 12
    json.dumps(facts)


def test_the_first_view_counts_from_the_start() -> None:
    facts = summary(None, Reading.parse(page(), at=10.0))
    assert facts["tokens_per_second"] is None
    assert facts["acceptance"] == pytest.approx(0.75)


def test_a_restarted_server_counts_from_zero() -> None:
    before = Reading.parse(page(rounds=1000), at=1.0)
    assert (
        between(before, Reading.parse(page(rounds=20), at=2.0)).total("knapspec:rounds_total") == 20
    )


def test_view_shows_the_answers() -> None:
    text = drawn(summary(None, Reading.parse(page(), at=10.0)))
    for words in (
        "drafting",
        "2 running",
        "2.00x",
        "12 of 30",
        "6 of 30",
        "75%",
        "predicted to lose",
    ):
        assert words in text, text


def test_view_before_anything_happened() -> None:
    idle = page(rounds=0, drafted=0, accepted=0, tokens=0)
    assert "declining" in drawn(
        summary(None, Reading.parse(idle.replace("} 1\n", "} 0\n"), at=1.0))
    )


def test_view_of_a_server_without_it() -> None:
    text = "\n".join(line for line in page().splitlines() if "knapspec" not in line) + "\n"
    facts = summary(None, Reading.parse(text, at=1.0))
    assert not facts["knapspec"]
    assert "no knapspec: metrics" in " ".join(drawn(facts).split())


@pytest.mark.parametrize(("share", "filled"), [(0, 0), (0.5, 5), (1, 10), (7, 10), (-1, 0)])
def test_bars(share: float, filled: int) -> None:
    assert bar(share, 10).count("█") == filled
    assert len(bar(share, 10)) == 10


class _Page(BaseHTTPRequestHandler):
    text = ""

    def do_GET(self) -> None:
        found = self.path == "/metrics"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.text.encode() if found else b"")

    def log_message(self, *arguments: object) -> None:
        pass


def test_exit_status(capsys: pytest.CaptureFixture) -> None:
    """0 with KnapSpec, 3 without it, 1 where nothing answers."""
    server = HTTPServer(("127.0.0.1", 0), _Page)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        _Page.text = page()
        assert main(["top", address, "--once", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["acceptance"] == 0.75
        _Page.text = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1\n"
        assert main(["top", f"http://{address}/metrics", "--once"]) == 3
        assert main(["top", f"{address}/nothing", "--once"]) == 1
        assert "write the server's address" in capsys.readouterr().err
    finally:
        server.shutdown()
    assert main(["top", "127.0.0.1:9", "--once"]) == 1
    assert main(["top", address, "--picture", "x.svg"]) == 1
