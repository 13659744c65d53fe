# SPDX-License-Identifier: Apache-2.0
"""Tokens and engine time after every step of a batch, and the decode windows in it.

LLM.generate returns each request's first and last time only. In a batch, rows start one after
another, so the time in which all of them decode begins in the middle of a step's history.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: (engine's clock in seconds, tokens of each row so far) after each step.
Step = tuple[float, tuple[int, ...]]


_LEAST_STEPS = 5
"""Of a turn. What an engine does across a turn's end teaches it nothing: with a round in each turn
KnapSpec never learned what rounds take (1.2 s at 8 x 5,000, turns of 0.5 s)."""


class Turns:
    """Lets other arms work in the middle of a batch, and keeps that out of its times.

    A shared machine changes speed within seconds; arms that take turns of half a second see the
    same of it, and arms that take turns of whole batches do not.
    """

    def __init__(self, seconds: float = 0.0, wait: Callable[[], None] = lambda: None) -> None:
        """seconds: length of a turn at least, 0: no end. wait: returns at the next one's begin."""
        self._length, self._wait = seconds, wait
        self._begun = time.monotonic()
        self._steps = 0
        #: Seconds between turns so far.
        self.waited = 0.0

    def begin(self) -> None:
        self._begun, self._steps = time.monotonic(), 0

    def after_step(self) -> None:
        now = time.monotonic()
        self._steps += 1
        long = now - self._begun >= self._length and self._steps >= _LEAST_STEPS
        if self._length and long:
            self._wait()
            self.begin()
            self.waited += self._begun - now


@contextmanager
def traced(engine: Any, turns: Turns | None = None) -> Iterator[list[Step]]:
    """Record the steps of an LLMEngine inside the block; none where it keeps no statistics."""
    steps: list[Step] = []
    rows: list[Any] = []
    original = engine.step
    turns = turns or Turns()
    turns.begin()

    def step(*args: Any, **kwargs: Any) -> Any:
        if not rows:  # generate() has added all requests; those that end leave the dict
            states = getattr(getattr(engine, "output_processor", None), "request_states", {})
            rows.extend(getattr(state, "stats", None) for state in states.values())
        outputs = original(*args, **kwargs)
        if rows and None not in rows:
            clock = max(row.last_token_ts for row in rows) - turns.waited
            steps.append((clock, tuple(row.num_generation_tokens for row in rows)))
        turns.after_step()
        return outputs

    engine.step = step  # on the instance: the class stays as it is
    try:
        yield steps
    finally:
        del engine.step


def row_times(steps: Sequence[Step]) -> list[tuple[float, float] | tuple[None, None]]:
    """Each row's first and last token on the engine's clock, in seconds; in the rows' order. None
    where a row has got no token."""
    found: list[tuple[float, float] | tuple[None, None]] = []
    for row in range(len(steps[-1][1]) if steps else 0):
        counts = [counts[row] for _, counts in steps]
        first = next((i for i, count in enumerate(counts) if count), None)
        if first is None:
            found.append((None, None))
        else:
            found.append((steps[first][0], steps[counts.index(counts[-1])][0]))
    return found


def windows(steps: Sequence[Step]) -> dict[str, list[float] | None]:
    """[seconds, tokens] of "decode" and "full"; None where there is no such time.

    Both begin when the last row has its first token. "decode" ends one step before the last row
    does, "full" one step before the first row that ends: so long the batch has all its rows. One
    step before, because a row's first draft is made before its first token is out, and its last
    verify step drafts nothing: up to the end there would be one verify step more than drafts, which
    flattered a request of 64 tokens by 7%. Only where nothing is left, "decode" goes to the end.
    """
    begun = next((i for i, (_, counts) in enumerate(steps) if min(counts) > 0), None)
    if begun is None:
        return {"decode": None, "full": None}
    last = steps[-1][1]
    ended = next(
        i
        for i, (_, counts) in enumerate(steps)
        if any(a == b for a, b in zip(counts, last, strict=True))
    )
    return {
        "decode": _window(steps, begun, min(len(steps) - 1, max(begun + 1, len(steps) - 2))),
        "full": _window(steps, begun, ended - 1),
    }


def _window(steps: Sequence[Step], begin: int, end: int) -> list[float] | None:
    seconds = steps[end][0] - steps[begin][0]
    tokens = sum(steps[end][1]) - sum(steps[begin][1])
    return [seconds, tokens] if end > begin and seconds > 0 else None
