# SPDX-License-Identifier: Apache-2.0
"""Calls of every kernel launcher at the sizes of real models, for `compile_for_gpu.py`.

Tensors are never read: what counts is dtype, shape, strides and numbers on the host. `batch` is
what a server changes from step to step. Calls of one kernel differ in what it is compiled for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import knapspec_vllm.kernels.attention_parts as attention_parts
from knapspec_vllm.kernels.branch_attention import branch_attention
from knapspec_vllm.kernels.curve_tables import CurveTables
from knapspec_vllm.kernels.dp_relax import dp_relax, gather_branches
from knapspec_vllm.kernels.draft_advance import draft_advance, draft_start
from knapspec_vllm.kernels.draft_state import DraftState
from knapspec_vllm.kernels.greedy_confidence import (
    greedy_confidence,
    greedy_partials,
    merge_greedy,
)
from knapspec_vllm.kernels.paged_decode_attention import paged_decode_attention
from knapspec_vllm.kernels.paged_kv import PagedKV
from knapspec_vllm.kernels.plan_tpt import plan_tpt

# The multiprocessors of an H100, so that launchers choose the grids they choose there.
attention_parts._multiprocessors = lambda device: 132

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[..., object]
    #: First architecture that has what the case needs.
    least_arch: int = 80


@dataclass(frozen=True)
class Attention:
    """Attention of one model over one kind of cache."""

    query_heads: int = 32
    heads: int = 8
    dim: int = 128
    dtype: torch.dtype = BF16
    cache_dtype: torch.dtype | None = None
    block_size: int = 16
    soft_cap: float = 0.0
    sliding_window: int = 0
    sinks: int = 0
    window: int = 0
    #: Whether the kernel finds K and V by offset tables instead of strides.
    tables: bool = False

    def kv(self) -> PagedKV:
        shape = (512, 2, self.block_size, self.heads, self.dim)
        cache = torch.empty(shape, dtype=self.cache_dtype or self.dtype)
        kv = PagedKV.of_views(cache[:, 0], cache[:, 1])
        if not self.tables:
            return kv
        key, value = (dataclasses.replace(where, strides=None) for where in (kv.key, kv.value))
        return dataclasses.replace(kv, key=key, value=value)

    def table(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, 131072 // self.block_size, dtype=torch.int32)

    @property
    def options(self) -> dict[str, float]:
        names = ("soft_cap", "sliding_window", "sinks", "window")
        return {name: getattr(self, name) for name in names}

    def decode(self, batch: int = 64, context: int = 8192) -> object:
        query = torch.empty(batch, self.query_heads, self.dim, dtype=self.dtype)
        lengths = torch.empty(batch, dtype=torch.int32)
        return paged_decode_attention(
            query,
            self.kv(),
            self.table(batch),
            lengths,
            0.1,
            max_length=context,
            **self.options,  # type: ignore[arg-type]
        )

    def branches(self, batch: int = 2, context: int = 8192, branches: int = 32) -> object:
        tokens = 16 * batch
        query = torch.empty(branches, tokens, self.query_heads, self.dim, dtype=self.dtype)
        tail = torch.empty(2, branches, tokens, self.heads, self.dim, dtype=self.dtype)
        lengths = torch.empty(batch, dtype=torch.int64)
        return branch_attention(
            query,
            self.kv(),
            self.table(batch),
            lengths,
            *tail,
            0.1,
            max_prefix=context,
            **self.options,  # type: ignore[arg-type]
        )


MODELS = {
    "8B": Attention(),
    "8B-window": Attention(sinks=64, window=512),
    "8B-fp16": Attention(dtype=FP16),
    "8B-fp8": Attention(cache_dtype=E4M3),
    "8B-e5m2": Attention(cache_dtype=E5M2),
    "8B-tables": Attention(tables=True),
    "smollm2": Attention(query_heads=9, heads=3, dim=64),
    "gemma-capped-sliding": Attention(
        query_heads=8, heads=4, dim=256, soft_cap=50.0, sliding_window=4096
    ),
    "mqa-wide-blocks": Attention(query_heads=48, heads=1, block_size=128),
    "odd-head-size": Attention(query_heads=32, heads=32, dim=80),
    "8B-fp32": Attention(dtype=FP32),
}


def relax(batch: int = 32, dtype: torch.dtype = BF16, dim: int = 4096, modes: int = 3) -> object:
    """The solver's choice among 33 branches, for `batch` reference tokens."""
    streams = [torch.empty(33, batch, dim, dtype=dtype) for _ in range(modes)] + [None] * 2
    full, window, skip = streams[:3]
    assert full is not None
    relaxed = dp_relax(
        full,
        window,
        skip,
        torch.empty(33),
        torch.empty(33, dtype=torch.bool),
        torch.empty(3),
        rows_out=33,
        prune_cosine=0.5,
        max_saving=0.9,
        exchange_rate=0.1,
    )
    return gather_branches(full, window, skip, relaxed.rows)


def plan(batch: int = 64, paper: bool = False) -> object:
    return plan_tpt(
        CurveTables(torch.empty(4, 9, 8), torch.empty(2, 9), torch.empty(9), 576, 32),
        torch.empty(32, 3),
        torch.empty(2, 32),
        torch.empty(batch, dtype=torch.int32),
        torch.empty(5),
        torch.empty(3),
        torch.empty(2, dtype=torch.int32),
        max_draft_length=8,
        paper=paper,
    )


def rounds(batch: int = 64, window_tokens: int = 512) -> None:
    """One round's bookkeeping; the confidence is a slice, as a last forward may leave it."""
    state = DraftState.allocate(
        batch,
        8,
        torch.empty(batch, 8192, dtype=torch.int32),
        block_size=16,
        max_model_len=131072,
        sink_blocks=4,
        window_tokens=window_tokens,
    )
    draft_start(state)
    draft_advance(
        state, torch.empty(batch, dtype=torch.int64), torch.empty(2, batch)[1], threshold=0.5
    )


def greedy(batch: int = 64, vocabulary: int = 128256, dtype: torch.dtype = BF16) -> object:
    return greedy_confidence(torch.empty(batch, vocabulary, dtype=dtype))


def sharded_greedy(batch: int = 64, valid: int = 16032) -> object:
    """One rank of eight, and the merge of what all ranks found."""
    greedy_partials(torch.empty(batch, 16064, dtype=BF16), first_token=16032, valid=valid)
    ids = torch.empty(8, batch, dtype=torch.int64)
    return merge_greedy(ids, *torch.empty(2, 8, batch))


CASES = [
    *(
        Case(f"{op}/{name}", call, least_arch=89 if model.cache_dtype is E4M3 else 80)
        for name, model in MODELS.items()
        for op, call in (
            ("decode", model.decode),
            ("decode-split", functools.partial(model.decode, batch=1)),
            ("branch", model.branches),
        )
    ),
    Case("dp_relax/8B", relax),
    Case("dp_relax/8B-no-window", functools.partial(relax, modes=2)),
    Case("dp_relax/8B-always-runs", functools.partial(relax, modes=1)),
    Case("dp_relax/8192-fp32", functools.partial(relax, dtype=FP32, dim=8192)),
    Case("dp_relax/smollm2", functools.partial(relax, dim=576)),
    Case("plan_tpt/32-plans", plan),
    Case("plan_tpt/paper", functools.partial(plan, paper=True)),
    Case("draft_advance/windowed", rounds),
    Case("draft_advance/full-only", functools.partial(rounds, window_tokens=0)),
    Case("greedy/llama3", greedy),
    Case("greedy/llama3-one-part-a-row", functools.partial(greedy, batch=2048)),
    Case("greedy/odd-fp32", functools.partial(greedy, vocabulary=50257, dtype=FP32)),
    Case("greedy/sharded", sharded_greedy),
]

#: Every kernel, and the main ways through it, in half a minute.
QUICK = {
    "decode/8B",
    "decode-split/8B",
    "decode/8B-fp8",
    "decode/8B-tables",
    "branch/8B",
    "dp_relax/8B",
    "dp_relax/8B-always-runs",
    "plan_tpt/32-plans",
    "draft_advance/windowed",
    "greedy/llama3",
    "greedy/sharded",
}
