# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.sample.rejection_sampler: a step without drafts samples as plain vLLM does.

Imported only in workers whose config selects KnapSpec.
"""

from __future__ import annotations

import functools
from typing import Any

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name


def install() -> None:
    """Wrap the rejection sampler's forward."""
    patch = by_name("plain_sampling")
    owner, attribute = compat.resolve(patch.target)
    apply.replace(patch.name, owner, attribute, _make_forward, patch.seam.parameters)


def _make_forward(original: Any) -> Any:
    @functools.wraps(original)
    def forward(
        self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any
    ) -> Any:
        # Host numbers. The logits are then one row a request, in their order.
        if any(metadata.num_draft_tokens):
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        # As the original samples behind a row's drafts. Otherwise a thinking budget counts rows by
        # drafts, and forces the end of thinking into row 0, whoever has used his up.
        return self.sampler(
            logits=logits, sampling_metadata=sampling_metadata, predict_bonus_token=True
        )

    return forward
