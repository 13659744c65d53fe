# SPDX-License-Identifier: Apache-2.0
"""From the worker that drafts to whoever shows its metrics, once a second.

vLLM's scheduler statistics have no free field, its messages drop unknown ones, and prometheus
files of its own (PROMETHEUS_MULTIPROC_DIR) exist only where somebody asked for them before the
start. So the worker's first rank hands what it counted to sinks: a file of the server's run folder,
which whichever API server process is scraped reads (`exposition`), and Ray's own metrics where the
worker is a Ray actor (`ray_sink`). The hot path only counts; a thread publishes, and never touches
the device.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger("vllm.knapspec")

INTERVAL_SECONDS = 1.0
RECENT_SECONDS = 60.0
TOUCH_SECONDS = 3600.0
"""A file in /tmp that nothing has changed for ten days is removed on many machines, and so is its
folder; of a server without traffic nothing changes."""
PREFIX = "engine-"
_numbers = itertools.count()


class Sink(Protocol):
    """Where an engine's metrics go."""

    def put(self, labels: Mapping[str, str], state: Mapping[str, Any]) -> None:
        """labels: of the engine, model_name and engine. state: of draft.snapshot; see families."""

    def close(self) -> None:
        """The engine has ended."""


class FileSink:
    """A small file of a run folder, replaced whenever something has changed."""

    def __init__(self, folder: Path, engine: int) -> None:
        # Engines of one process, one after the other, must not remove each other's.
        self.path = folder / f"{PREFIX}{engine}-{os.getpid()}-{next(_numbers)}.json"
        self._last = ""
        self._touched = time.monotonic()
        self._failed = False
        """Writing has failed once, and was logged."""

    def put(self, labels: Mapping[str, str], state: Mapping[str, Any]) -> None:
        text = json.dumps({"labels": labels, "state": state})
        if text == self._last and self._keep():
            return
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, self.path)
            self._last = text
        except OSError as error:  # the run folder went with its server, or the disk is full
            if not self._failed:
                logger.warning("KnapSpec could not write its metrics to %s: %s", self.path, error)
            self._failed = True
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _keep(self) -> bool:
        """Whether the file is there still, which is looked at once in TOUCH_SECONDS. It does not
        become newer: another engine's of the same number may have taken its place."""
        if time.monotonic() - self._touched < TOUCH_SECONDS:
            return True
        self._touched = time.monotonic()
        try:
            os.utime(self.path, (time.time(), self.path.stat().st_mtime))
            os.utime(self.path.parent)
        except OSError:
            return False
        return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


class Publisher:
    """Puts `read()` into every sink once an interval, until `read` returns None."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        engine: int,
        model: str,
        read: Callable[[], dict[str, Any] | None],
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        """engine: index of the engine core, for data-parallel servers. model: its served name."""
        self._sinks = list(sinks)
        self._labels = {"model_name": model, "engine": str(engine)}
        self._read = read
        self._interval = interval_seconds
        self._failed = False
        """Reading has failed once, and was logged."""
        #: (time, plain_us, round_us) of the last minute.
        self._recent: deque[tuple[float, float, float]] = deque()
        self._thread = threading.Thread(target=self._run, name="knapspec-metrics", daemon=True)

    def start(self) -> None:
        self.write()
        self._thread.start()

    def write(self) -> bool:
        """Publish now. False when there is nothing to read any more."""
        try:
            state = self._read()
        except Exception:  # the engine's thread goes on meanwhile; metrics must come back
            if not self._failed:
                logger.exception("KnapSpec could not read its state; it will try again")
            self._failed = True
            return True
        if state is None:
            for sink in self._sinks:
                sink.close()
            return False
        state["recent_speedup"] = self._recent_speedup(state["stats"])
        for sink in list(self._sinks):
            try:
                sink.put(self._labels, state)
            except Exception:  # of Ray's: the other sink goes on
                logger.exception("KnapSpec publishes no more metrics to %s", type(sink).__name__)
                self._sinks.remove(sink)
        return True

    def _run(self) -> None:
        while True:
            time.sleep(self._interval)
            if not self.write():
                return

    def _recent_speedup(self, stats: dict[str, Any]) -> float | None:
        """Over plain decoding, in the last minute; None when no round of it was measured."""
        now, recent = time.monotonic(), self._recent
        counted = (now, stats["realised_plain_us"], stats["realised_round_us"])
        if not recent or counted[2] != recent[-1][2]:
            recent.append(counted)
        while len(recent) > 1 and recent[1][0] < now - RECENT_SECONDS:
            recent.popleft()
        _, plain_us, round_us = recent[0]
        taken_us = counted[2] - round_us
        return (counted[1] - plain_us) / taken_us if taken_us > 0 else None
