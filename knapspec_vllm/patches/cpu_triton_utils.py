# SPDX-License-Identifier: Apache-2.0
"""vllm.utils.cpu_triton_utils: sampled speculation on CPU reads the right parameters.

Imported only in workers whose config selects KnapSpec.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name


def install() -> None:
    """Replace the kernel in every place that bound it; nothing where real Triton runs."""
    patch = by_name("cpu_expand")
    for owner, attribute in compat.cpu_expand_holders():
        apply.replace(patch.name, owner, attribute, _make_expand, patch.seam.parameters)


def _make_expand(original: Any) -> Any:
    @functools.wraps(original)
    def expand(
        # [num_tokens]
        output: torch.Tensor,
        # [batch_size], dtype of output
        input_val: torch.Tensor,
        # [batch_size], running sum of tokens per row
        cu_num_tokens: torch.Tensor,
        replace_from: float,
        replace_to: float,
        MAX_NUM_TOKENS: int | None = None,  # vLLM passes it by this name
    ) -> None:
        if output.dtype == input_val.dtype == torch.int64:
            original(output, input_val, cu_num_tokens, replace_from, replace_to)
            return
        replaced = torch.where(input_val == replace_from, replace_to, input_val)
        ends = cu_num_tokens.long()
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        expanded = torch.repeat_interleave(replaced, counts)
        output[: expanded.shape[0]].copy_(expanded)

    return expand
