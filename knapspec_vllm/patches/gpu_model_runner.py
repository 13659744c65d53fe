# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.worker.gpu_model_runner (which the CPU runner subclasses): call the proposer.

Imported only in workers whose config selects KnapSpec.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name


def install() -> None:
    """Wrap the methods through which the runner drafts."""
    for name, make in (
        ("propose", _make_propose),
        ("fits_in_drafter", _make_fits),
        ("async_sampled", _make_states),
    ):
        patch = by_name(name)
        owner, attribute = compat.resolve(patch.target)
        apply.replace(name, owner, attribute, make, patch.seam.parameters)


def drafter_of(runner: Any) -> Any | None:
    """The runner's KnapSpec proposer, or None (another method, or not the last pipeline rank)."""
    drafter = getattr(runner, "drafter", None)
    return drafter if callable(getattr(drafter, "propose_full", None)) else None


def _make_propose(original: Any) -> Any:
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = drafter_of(self)
        if drafter is None:
            return original(self, *args, **kwargs)
        # As the original does: probabilities of an older draft must not meet a newer one.
        self._draft_probs = None
        self._draft_prob_req_ids = None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if drafter.asynchronous is None:
            return drafter.propose_full(self, **given)
        return drafter.asynchronous.propose(
            given["scheduler_output"], given["common_attn_metadata"]
        )

    return propose_draft_token_ids


def _make_fits(original: Any) -> Any:
    @functools.wraps(original)
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        drafter = drafter_of(self)
        if drafter is None:
            return original(self, common_attn_metadata)  # type: ignore[no-any-return]
        if drafter.asynchronous is not None:
            # The one moment after sampling and before vLLM's own bookkeeping.
            drafter.asynchronous.publish()
        return common_attn_metadata is not None

    return _input_fits_in_drafter


def _make_states(original: Any) -> Any:
    @functools.wraps(original)
    def _update_states_after_model_execute(
        self: Any, output_token_ids: Any, scheduler_output: Any
    ) -> Any:
        drafter = drafter_of(self)
        if drafter is not None and drafter.asynchronous is not None:
            drafter.asynchronous.sampled(output_token_ids, scheduler_output)
        return original(self, output_token_ids, scheduler_output)

    return _update_states_after_model_execute
