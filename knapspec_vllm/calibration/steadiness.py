# SPDX-License-Identifier: Apache-2.0
"""Whether a machine was left alone while its cost curves were measured."""

from __future__ import annotations

from collections.abc import Iterable

from knapspec_vllm.planner.costs import CostSample, times_by_shape
from knapspec_vllm.planner.curves import median

MOST_UNSTEADY = 1.3
"""Curves of a machine less steady than this are not kept for the next start. At rest two cores of a
Xeon had 1.02 to 1.03, beside a busy loop 1.11 to 1.40 and beside matrix products on both cores 1.04
to 1.32 (SmolLM2 and a small random model, two calibrations each): what slows every repetition alike
does not show, but leaves what is compared alike as well."""


def unsteadiness(samples: Iterable[CostSample]) -> float | None:
    """How many times its fastest repetition a shape is priced at (the median of them), in the
    median over shapes; 1 at best. None where no shape was repeated.
    """
    repeated = [times for times in times_by_shape(samples).values() if len(times) > 1]
    found = [median(times) / min(times) for times in repeated]
    return median(found) if found else None
