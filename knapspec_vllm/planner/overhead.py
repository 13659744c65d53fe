# SPDX-License-Identifier: Apache-2.0
"""What a round costs beyond the cost model: metadata, bookkeeping, the model's own error.

Plain and speculative rounds are averaged apart. What both pay (the engine's scheduler, say) is
paid by stock vLLM too and must not count against speculation; only the difference does.
"""

from __future__ import annotations

_RATE = 1.0 / 16.0
"""Weight of the newest round in the moving average."""
_CLIP = 0.5
"""A round further off than this share of its prediction (a compile, a pause) counts as this."""
_VERSION_STEP = 0.01
"""A move by this share of a round is worth choosing again."""


def with_overhead(step_us: float, extra_us: float) -> float:
    """A step and what a round costs on top; at least half the step.

    The overhead is one number for all batches, and may be negative: learned on large batches it
    would make a small batch's step cost nothing or less.
    """
    return max(step_us + extra_us, (1.0 - _CLIP) * step_us)


class RoundOverhead:
    """Moving averages of measured minus predicted round time, microseconds."""

    def __init__(self, fixed_us: float | None = None) -> None:
        """fixed_us: use this for speculative rounds, 0 for plain ones, and learn nothing."""
        self._fixed_us = fixed_us
        self._means: dict[bool, float] = {}
        self._published: dict[bool, float] = {}
        self.version = 0
        """Grows whenever an average has moved materially."""

    def observe(self, speculative: bool, predicted_us: float, time_us: float) -> None:
        """One round. predicted_us: step plus drafting as the cost model prices them."""
        if self._fixed_us is not None or predicted_us <= 0:
            return
        limit = _CLIP * predicted_us
        extra_us = min(max(time_us - predicted_us, -limit), limit)
        mean = self._means.get(speculative, extra_us)
        mean += _RATE * (extra_us - mean)
        self._means[speculative] = mean
        published = self._published.get(speculative)
        if published is None or abs(mean - published) >= _VERSION_STEP * predicted_us:
            self._published[speculative] = mean
            self.version += 1

    def plain_us(self) -> float:
        """Overhead of a round without drafts; 0 until one was seen, which errs toward declining."""
        return self._means.get(False, 0.0) if self._fixed_us is None else 0.0

    def speculative_us(self) -> float:
        """Overhead of a round with drafts; that of a plain round until one was seen."""
        if self._fixed_us is not None:
            return self._fixed_us
        return self._means.get(True, self.plain_us())
