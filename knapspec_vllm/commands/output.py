# SPDX-License-Identifier: Apache-2.0
"""A command's answer alone on standard output, where vLLM logs too; progress on standard error."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_TICK_SECONDS = 1.0


@contextmanager
def answers_only() -> Iterator[TextIO]:
    """Inside, whatever is written to standard output goes to standard error, child processes'
    output included; what is written to the stream that this gives is the command's answer."""
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        yield answer
    finally:
        sys.stdout.flush()
        answer.flush()
        os.dup2(answer.fileno(), 1)
        answer.close()


@contextmanager
def under_way(text: str) -> Iterator[None]:
    """Says on standard error what goes on and then how long it took; a terminal sees it count."""
    start = time.monotonic()
    done = threading.Event()
    live = sys.stderr.isatty()

    def say(end: str) -> None:
        seconds = f"{time.monotonic() - start:.0f} s"
        print(f"\rknapspec: {text} ... {seconds}", end=end, file=sys.stderr, flush=True)

    def count() -> None:
        while not done.wait(_TICK_SECONDS):
            say("")

    counting = threading.Thread(target=count, daemon=True)
    if live:
        counting.start()
    else:
        print(f"knapspec: {text} ...", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        done.set()
        if live:
            counting.join()
            say("\n")
    if not live:
        print(f"knapspec: {text}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
