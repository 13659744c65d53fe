# SPDX-License-Identifier: Apache-2.0
"""Tensor operations of KnapSpec; the only part that imports `knapspec_vllm.kernels`.

Each function checks its arguments and runs Triton when the tensors are on a GPU or Triton's
interpreter is on (TRITON_INTERPRET=1), else the eager twin; KNAPSPEC_KERNELS=eager forces the twin.
What an op computes is defined by its twin in `kernels/reference/`. Nothing here looks at a
tensor's values, so all of it can be captured in a CUDA graph.
"""

from knapspec_vllm.kernels.curve_tables import CurveTables, PlanChoice
from knapspec_vllm.kernels.draft_state import DraftState
from knapspec_vllm.kernels.paged_kv import Addresses, PagedKV
from knapspec_vllm.kernels.relaxed import Relaxed
from knapspec_vllm.ops.attention import branch_attention, paged_decode_attention
from knapspec_vllm.ops.dispatch import launch_errors, launches, to_device, uses_triton
from knapspec_vllm.ops.drafting import (
    draft_advance,
    draft_start,
    greedy_confidence,
    greedy_partials,
    merge_greedy,
)
from knapspec_vllm.ops.planning import dp_relax, gather_branches, plan_tpt

__all__ = [
    "Addresses",
    "CurveTables",
    "DraftState",
    "PagedKV",
    "PlanChoice",
    "Relaxed",
    "branch_attention",
    "dp_relax",
    "draft_advance",
    "draft_start",
    "gather_branches",
    "greedy_confidence",
    "greedy_partials",
    "launch_errors",
    "launches",
    "merge_greedy",
    "paged_decode_attention",
    "plan_tpt",
    "to_device",
    "uses_triton",
]
