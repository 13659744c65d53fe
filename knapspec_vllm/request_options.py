# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for, through the OpenAI request's `vllm_xargs`.

    {"model": ..., "messages": [...], "vllm_xargs": {"knapspec_draft_length": 0}}

0 opts out of speculation, n drafts at most n tokens a round for this request; others in the same
batch are not affected. In Python: `SamplingParams(extra_args={"knapspec_draft_length": 0})`.
"""

from __future__ import annotations

import difflib
import functools
import logging
import reprlib
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("vllm.knapspec")

DRAFT_LENGTH = "knapspec_draft_length"
_NEAR = 0.85
"""Other extensions have keys such as max_length, which is 0.52 like ours."""


def draft_limit(extra_args: Mapping[str, Any] | None) -> int | None:
    """Most tokens to draft a round for a request; None where it does not say.

    Raises ValueError, naming the key, for a value that is not a whole number of 0 or more.
    """
    if not extra_args or DRAFT_LENGTH not in extra_args:
        return None
    value = extra_args[DRAFT_LENGTH]
    # vLLM's request schema may have made a float or text of a number.
    try:
        number = int(value)
        exact = not isinstance(value, bool) and number == float(value)
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or number < 0:
        raise ValueError(
            f"vllm_xargs['{DRAFT_LENGTH}'] is {reprlib.repr(value)}; write a whole number: 0 "
            "to decode this request without speculation, n to draft at most n tokens a round."
        )
    return number


def admitted_limit(extra_args: Mapping[str, Any] | None) -> int | None:
    """As `draft_limit`, but 0, with a warning, for what should have been refused at admission.

    A front end that took its configuration from another process, as Ray Serve LLM's replicas do,
    has not loaded vLLM's plugins and refuses nothing; one request must not end its server.
    """
    try:
        return draft_limit(extra_args)
    except ValueError as error:
        _warn(f"{error} It is served without speculation.")
        return 0


@functools.lru_cache(maxsize=64)  # a request is looked at every round
def _warn(sentence: str) -> None:
    logger.warning("KnapSpec: %s", sentence)


def check(extra_args: Mapping[str, Any] | None) -> None:
    """Raises ValueError for a bad value, and for a key that only resembles ours."""
    draft_limit(extra_args)
    for key in map(str, extra_args or ()):
        near = difflib.get_close_matches(key, [DRAFT_LENGTH], n=1, cutoff=_NEAR)
        if key != DRAFT_LENGTH and (near or key.startswith("knapspec")):
            raise ValueError(f"unknown vllm_xargs key '{key}'; did you mean '{DRAFT_LENGTH}'?")
