# SPDX-License-Identifier: Apache-2.0
"""The demo's parts that need no vLLM: parsing, table, and that no process stays behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")

from knapspec_vllm.bench import report, servers
from knapspec_vllm.bench.measure import Arm, PlanLog, SpecCounters

ROOT = Path(__file__).resolve().parents[2]
# A server with a child, which is what has to be ended; both ignore SIGTERM if told to.
FAKE_SERVER = """
import os, signal, subprocess, sys, time, http.server
stubborn = sys.argv[2] == "stubborn"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
print("child", subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

METRICS = """
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="demo"} 40.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="demo"} 10.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="demo"} 200.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="demo"} 1.5e+02
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 90.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="demo"} 1.7e+09
"""


def test_counters_from_metrics():
    counters = SpecCounters.from_metrics(METRICS)
    assert counters == SpecCounters(50, 200, 150)
    assert counters.accepted_length == 4.0
    assert counters.acceptance_rate == 0.75
    later = SpecCounters(60, 260, 190) - counters
    assert later == SpecCounters(10, 60, 40)


def test_counters_without_speculation():
    counters = SpecCounters.from_metrics("vllm:generation_tokens_total 5.0\n")
    assert counters.accepted_length is None
    assert counters.acceptance_rate is None


PREFIX = "(EngineCore pid=7) INFO 11-22 02:28:31 [planning.py:178] "
PLAN = (
    PREFIX
    + "KnapSpec plan: skip the attention of layers 1, 2 and the MLP of layer 4, draft length "
    "5, predicted speedup 1.85x (batch 1, context 213): best of 12 plans\n"
)
DECLINE = PREFIX + "KnapSpec declines: no plan is predicted above 1.03x (batch 1, context 40)\n"


def test_plan_from_log():
    log = PlanLog.from_log(DECLINE + PLAN)
    assert log.plan == "skip the attention of layers 1, 2 and the MLP of layer 4"
    assert (log.draft_length, log.predicted_speedup) == (5, 1.85)
    assert log.declined == "no plan is predicted above 1.03x"
    assert not log.ends_declining


def test_end_of_a_request_is_no_decision():
    end = PREFIX + "KnapSpec declines: no room for a draft in this batch (batch 1, context 91)\n"
    assert not PlanLog.from_log(PLAN + end).ends_declining


def test_decline_from_log():
    log = PlanLog.from_log(PLAN + DECLINE)
    assert log.ends_declining
    empty = PlanLog.from_log("nothing of ours\n")
    assert empty.plan is empty.declined is None
    assert not empty.ends_declining


def test_table_and_answers():
    plain = Arm("plain vLLM", answers=["a", "b"], rates=[10.0, 12.0, 11.0])
    ours = Arm("KnapSpec", answers=["a", "c"], rates=[22.0], counters=SpecCounters(50, 200, 150))
    ours.log = PlanLog.from_log(PLAN)
    idle = Arm("declining", answers=["a", "b"], rates=[11.0], log=PlanLog.from_log(DECLINE))
    text = report.table([plain, ours, idle])
    assert "11.0" in text
    assert "2.00x" in text
    assert "4.00" in text
    assert "75%" in text
    assert "1 of 2" in text
    assert "declines: no plan" in text
    assert max(map(len, text.splitlines())) <= sum(report.WIDTHS) + 3 * len(report.WIDTHS)
    shown = report.answers([plain, ours, idle], ["first?", "second?"])
    assert shown.count("differs under KnapSpec") == 1
    assert "near-tie" in report.notes([plain, ours], "bfloat16")
    assert "near-tie" not in report.notes([plain, idle], "bfloat16")
    assert "near-tie" not in report.notes([plain, ours], "float32")


class FakeServer(servers.Server):
    @property
    def command(self):
        return [sys.executable, "-c", FAKE_SERVER, str(self.port), self.model]


def child_of(server: servers.Server) -> int:
    words = server.log_text().split()
    return int(words[words.index("child") + 1])


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_dead(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize("manner", ["obedient", "stubborn"])
def test_servers_end_with_their_children(tmp_path, monkeypatch, manner):
    monkeypatch.setattr(servers, "STOP_SECONDS", 1.0)
    server = FakeServer("fake", manner, [], tmp_path / "fake.log")
    with pytest.raises(KeyboardInterrupt), servers.running([server], timeout_seconds=30):
        pid, child = server.process.pid, child_of(server)
        assert alive(child)
        raise KeyboardInterrupt
    assert wait_dead(pid)
    assert wait_dead(child)


def test_failed_start_shows_the_log(tmp_path):
    class Failing(servers.Server):
        @property
        def command(self):
            return [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]

    server = Failing("fake", "", [], tmp_path / "fake.log")
    with (
        pytest.raises(servers.ServerError, match=r"status 3\n +the reason"),
        servers.running([server], timeout_seconds=30),
    ):
        pass


def test_unhealthy_server_times_out(tmp_path):
    class Silent(servers.Server):
        @property
        def command(self):
            return [sys.executable, "-c", "import time; time.sleep(600)"]

    server = Silent("fake", "", [], tmp_path / "fake.log")
    with (
        pytest.raises(servers.ServerError, match="not healthy after 1 s"),
        servers.running([server], timeout_seconds=1.0),
    ):
        pass
    assert server.process is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_to_the_demo_end_its_servers(tmp_path, number):
    script = f"""
import importlib.util, sys, time
from knapspec_vllm.bench import servers
sys.argv = ["x"]
class FakeServer(servers.Server):
    @property
    def command(self):
        return [sys.executable, "-c", {FAKE_SERVER!r}, str(self.port), "obedient"]
servers.install_signal_handlers()
from pathlib import Path
server = FakeServer("fake", "", [], Path({str(tmp_path / "fake.log")!r}))
with servers.running([server], 30):
    print("pid", server.process.pid, flush=True)
    time.sleep(600)
"""
    demo = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    pid = demo.pid
    try:
        pid = next(int(line.split()[1]) for line in demo.stdout if line.startswith("pid "))
        child = int((tmp_path / "fake.log").read_text().split()[1])
        demo.send_signal(number)
        demo.wait(30)
        assert wait_dead(pid)
        if number != signal.SIGKILL:  # then only the API server is told; vLLM's ends its engine
            assert wait_dead(child)
    finally:
        for leftover in (demo.pid, pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leftover, signal.SIGKILL)
