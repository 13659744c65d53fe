# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` processes that never outlive the one that started them.

Each server runs in a session of its own, so that Ctrl-C reaches only the parent, which then ends
whole process groups: the API server, its engine and whatever that started. This happens at the end
of `running()`, on SIGINT, SIGTERM and SIGHUP, and at exit; on Linux the kernel also ends the API
server (and it its engine) should the parent be killed outright.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

STOP_SECONDS = 15.0  # how long a server may take to end by itself
LOG_TAIL_LINES = 40
_PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """A server ended or did not become healthy in time; the message has the end of its log."""


@dataclass
class Server:
    """One `vllm serve` process: command line, log file and address."""

    name: str
    model: str
    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        """The same as `vllm serve`, by the Python that runs this."""
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        return [*serve, *address, *self.arguments]

    def start(self) -> None:
        self.port = free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "NO_COLOR": "1", **self.environment},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        _started.append(self)

    def wait_healthy(self, timeout_seconds: float) -> float:
        """Seconds until /health answered. Raises ServerError with the end of the log."""
        assert self.process is not None, "start() comes first"
        begin = shown = time.monotonic()
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return time.monotonic() - begin
            now = time.monotonic()
            if self.process.poll() is not None:
                raise self._error(f"ended with status {self.process.returncode}")
            if now - begin > timeout_seconds:
                raise self._error(f"is not healthy after {timeout_seconds:.0f} s")
            if now - shown > 20:
                shown = now
                print(f"    ... {now - begin:.0f} s", flush=True)
            time.sleep(0.5)

    def _error(self, what: str) -> ServerError:
        lines = self.log_text().splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"    {line}" for line in lines)
        command = " ".join(self.command)
        return ServerError(f"{self.name} {what}\n{tail}\n  log: {self.log}\n  command: {command}")

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def metrics_text(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return answer.read().decode()

    def stop(self) -> None:
        """End the whole process group; safe to call again."""
        if self.process is None:
            return
        if self.process.poll() is None:
            signal_group(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        # Also when the API server is gone: its engine may not be.
        signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


_started: list[Server] = []


def stop_all() -> None:
    """Stop every server of this process; a second Ctrl-C does not interrupt it."""
    ignored = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        running = [server for server in _started if server.process is not None]
        for server in running:
            if server.process is not None:
                signal_group(server.process.pid, signal.SIGTERM)
        for server in running:
            server.stop()
        _started.clear()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running(servers: list[Server], timeout_seconds: float) -> Iterator[None]:
    """Start the servers one after another, each healthy before the next; stop all at the end."""
    try:
        for server in servers:
            print(f"  starting {server.name}", flush=True)
            server.start()
            print(f"    healthy after {server.wait_healthy(timeout_seconds):.0f} s", flush=True)
        yield
    finally:
        stop_all()


def install_signal_handlers() -> None:
    """Turn SIGTERM and SIGHUP into SystemExit, so that `running()` cleans up as on Ctrl-C."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
    atexit.register(stop_all)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def speculative_config(num_speculative_tokens: int) -> list[str]:
    """Command-line arguments that turn KnapSpec on."""
    value = {"method": "knapspec", "num_speculative_tokens": num_speculative_tokens}
    return ["--speculative-config", json.dumps(value)]


def signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # A stopped process acts on that only once it is continued, which the kernel does with a
        # SIGHUP to orphans; under nohup they would have inherited to ignore it.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
