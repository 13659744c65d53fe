# SPDX-License-Identifier: Apache-2.0
"""Standard output for a command's answer alone: vLLM logs there too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


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
