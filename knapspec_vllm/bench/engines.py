# SPDX-License-Identifier: Apache-2.0
"""Engines of a benchmark as processes that stand still while it is not their turn.

An idle engine is stopped (SIGSTOP), for its threads may poll for work on cores that the working one
needs. Each has a process group of its own in this session: Ctrl-C reaches only the parent, which
then ends whole groups, and should the parent be killed outright, the kernel sends SIGHUP and
SIGCONT to groups with stopped processes, and SIGTERM to a working one.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knapspec_vllm.bench.servers import end_with_parent, signal_group

STOP_SECONDS = 15.0  # how long an engine may take to end by itself
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # Only so can a function be sent to the workers that reads KnapSpec's state.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "PYTHONUNBUFFERED": "1",
}
_ERROR = re.compile(r"(?:^|\s)((?:[\w.]*\.)?\w*(?:Error|Exception)): (\S.*)$")
# Who reports that somebody else failed.
_ECHOES = ("Engine core init", "Engine core proc", "WorkerProc init", "See root cause")


class EngineError(RuntimeError):
    """An engine did not start, failed or took too long; the message is one line."""


@dataclass
class Engine:
    """One arm's engine. settings: keyword arguments of vllm.LLM."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float = 1800.0
    #: What the engine said of itself when it was ready.
    facts: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    #: Kept for the reader where the engine failed.
    log: Path | None = None
    failed: bool = False

    @property
    def command(self) -> list[str]:
        module = ["-m", "knapspec_vllm.bench.worker"]
        return [sys.executable, *module, json.dumps(self.settings)]

    def start(self) -> None:
        """Start the engine and wait until it can take requests."""
        handle, path = tempfile.mkstemp(
            prefix=f"knapspec-bench-{_filename(self.name)}-", suffix=".log"
        )
        self.log = Path(path)
        with os.fdopen(handle, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **ENVIRONMENT, **self.environment},
                preexec_fn=_own_group,
            )
        self._rest = b""
        self.facts = self._read()

    def turn(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Work on a request, see `worker.run_round`, or go on with it, then stand still.

        None: this turn is over and the request is not.
        """
        assert self.process is not None
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # the read below says why
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        answer = self._read()
        self.pause()
        return None if "turn" in answer else answer

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def ask_to_end(self) -> None:
        """The worker shuts its engine down and leaves when it has read to the end."""
        if self.process is None or self.process.stdin is None:
            return
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def stop(self) -> None:
        """End the whole process group; safe to call again."""
        if self.process is None:
            return
        self.ask_to_end()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        # Also when the worker is gone: its engine may not be.
        self._signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        if self.log is not None and not self.failed:
            self.log.unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            signal_group(self.process.pid, number)

    def _read(self) -> dict[str, Any]:
        """The next answer. Raises EngineError with the reason if there is none."""
        assert self.process is not None
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        deadline = time.monotonic() + self.timeout_seconds
        while b"\n" not in self._rest:
            # An engine process that outlives its worker keeps the pipe open: ask for both.
            readable, _, _ = select.select([pipe], [], [], 1.0)
            data = os.read(pipe, 1 << 20) if readable else b""
            self._rest += data
            if (readable and not data) or (not readable and self.process.poll() is not None):
                raise self._error("its process ended")
            if time.monotonic() > deadline:
                raise self._error(f"no answer in {self.timeout_seconds:.0f} s (--timeout)")
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def _error(self, what: str) -> EngineError:
        assert self.log is not None
        self.failed = True
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if what == "its process ended" or any(echo in what for echo in _ECHOES):
            what = root_cause(text) or what
        return EngineError(f"arm {self.name}: {what} (log: {self.log})")


@contextmanager
def running(engines: Sequence[Engine]) -> Iterator[None]:
    """Start one engine after another, stop each that is ready until its turn; end all behind it."""
    try:
        for engine in engines:
            print(f"  starting {engine.name}", flush=True)
            start = time.monotonic()
            engine.start()
            engine.pause()
            print(f"    ready after {time.monotonic() - start:.0f} s", flush=True)
        yield
    finally:
        with _undisturbed():
            for engine in engines:
                engine.ask_to_end()
            for engine in engines:
                engine.stop()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not leave engines behind."""
    ignored = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def root_cause(log: str) -> str | None:
    """The last error in a vLLM log that is not the echo of another; None without one."""
    lines = log.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        found = _ERROR.search(lines[number])
        if found and not any(echo in lines[number] for echo in _ECHOES):
            message = found[2].strip()
            if "validation error" in message and number + 1 < len(lines):
                return lines[number + 1].strip()
            return message
    return None


def _filename(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)[:40]


def _own_group() -> None:
    os.setpgid(0, 0)
    end_with_parent()
