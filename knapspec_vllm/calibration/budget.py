# SPDX-License-Identifier: Apache-2.0
"""How long measuring may take."""

from __future__ import annotations

import time

from knapspec_vllm.draft.agreement import Agreement


class Budget:
    """Time for measuring, by the clock of rank 0: what is measured holds collectives, and a rank
    that measured one shape more than the others would wait in it forever."""

    def __init__(self, seconds: float, agreement: Agreement) -> None:
        self._agreement = agreement
        self.seconds = seconds
        self._start = time.perf_counter()

    @property
    def alone(self) -> bool:
        """Whether this rank may stop of its own accord."""
        return self._agreement.alone

    @property
    def spent(self) -> float:
        """Seconds, by this rank's clock."""
        return time.perf_counter() - self._start

    def half_gone(self) -> bool:
        """All ranks must ask."""
        return self._agreement.share(self.spent > 0.5 * self.seconds)

    def allows(self, done: int) -> bool:
        """Another cell after so many? All ranks must ask.

        A cell costs in proportion to its tokens at most; stops before the one that would overrun.
        """
        spent = self.spent
        return self._agreement.share(not done or spent + spent / done <= self.seconds)
