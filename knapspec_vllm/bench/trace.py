# SPDX-License-Identifier: Apache-2.0
"""Tokens and engine time after every step of a batch, and the decode windows in it.

LLM.generate returns each request's first and last time only. In a batch, rows start one after
another, so the time in which all of them decode begins in the middle of a step's history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: (engine's clock in seconds, tokens of each row so far) after each step.
Step = tuple[float, tuple[int, ...]]


@contextmanager
def traced(engine: Any) -> Iterator[list[Step]]:
    """Record the steps of an LLMEngine inside the block; none where it keeps no statistics."""
    steps: list[Step] = []
    rows: list[Any] = []
    original = engine.step

    def step(*args: Any, **kwargs: Any) -> Any:
        if not rows:  # generate() has added all requests; those that end leave the dict
            states = getattr(getattr(engine, "output_processor", None), "request_states", {})
            rows.extend(getattr(state, "stats", None) for state in states.values())
        outputs = original(*args, **kwargs)
        if rows and None not in rows:
            clock = max(row.last_token_ts for row in rows)
            steps.append((clock, tuple(row.num_generation_tokens for row in rows)))
        return outputs

    engine.step = step  # on the instance: the class stays as it is
    try:
        yield steps
    finally:
        del engine.step


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
