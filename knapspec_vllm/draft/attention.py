# SPDX-License-Identifier: Apache-2.0
"""Who computes the attention of draft forwards, and from what.

A round of forwards differs from step to step in the rows' lengths and slots alone, which
`ops.draft_advance` changes in place. So everything else is made once a round, or once for all where
steps are captured: tables, the forward context, the common metadata. Only what a backend derives
from the lengths is made again each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.metadata import StepMetadata
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.models.view import AttentionCore
from knapspec_vllm.planner.types import Mode, Plan

AttentionPath = Literal["backend", "kernel"]
"""Who computes draft attention: vLLM's attention backend, or `ops.paged_decode_attention`."""

Cores = Callable[[int], AttentionCore | None]
"""Layer -> its attention core; None: vLLM's own attention module, in its forward context."""


Round = AbstractContextManager[tuple[Cores, Callable[[], None]]]
"""Of one round: the cores of the plan's layers, and what to call before each forward."""


class DraftAttention(Protocol):
    """Either of the two below."""

    def round(self, plan: Plan, state: ops.DraftState, longest: int) -> Round:
        """longest: host-side upper bound of the rows' lengths in any forward of the round."""


class BackendAttention:
    """vLLM's attention backend, called without the module and context lookups in front of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._metadata = StepMetadata(engine)
        modules = [engine.view.attention_layer(i) for i in range(engine.view.num_layers)]
        # With one group of layers, one piece of metadata serves them all.
        one_group = len(engine.attention_groups) == 1
        self._direct = one_group and all(_callable_directly(module) for module in modules)
        #: Of the current step, by mode.
        self._now: dict[Mode, Any] = {}
        self._slots: torch.Tensor | None = None
        self._cores = {
            mode: [self._core(module, mode) for module in modules]
            for mode in (Mode.FULL, Mode.WINDOW)
        }

    @contextmanager
    def round(
        self, plan: Plan, state: ops.DraftState, longest: int
    ) -> Iterator[tuple[Cores, Callable[[], None]]]:
        """See `DraftAttention`; metadata is made anew before each forward."""
        commons = {}
        if any(plan.attention(layer) == Mode.FULL for layer in range(plan.num_layers)):
            commons[Mode.FULL] = self._metadata.common(
                state.block_table, state.lengths, state.slots, state.positions, longest
            )
        if state.window_table is not None:
            commons[Mode.WINDOW] = self._metadata.common(
                state.window_table,
                state.window_lengths,
                state.slots,
                state.positions,
                min(longest, state.window_table.shape[1] * self._engine.block_size),
            )
        by_layer: dict[str, Any] = {}

        def refresh() -> None:
            for mode, common in commons.items():
                built = self._metadata.built(common)
                self._now[mode] = built[self._engine.layer_names[0]]
                if not self._direct:
                    for layer, name in enumerate(self._engine.layer_names):
                        if plan.attention(layer) == mode:
                            by_layer[name] = built[name]

        def core_of(layer: int) -> AttentionCore | None:
            return self._cores[plan.attention(layer)][layer] if self._direct else None

        self._slots = state.slots
        with self._metadata.active(by_layer, state.slots):
            yield core_of, refresh

    def _core(self, module: Any, mode: Mode) -> AttentionCore:
        heads, kv_heads, size = module.num_heads, module.num_kv_heads, module.head_size
        impl, now = module.impl, self._now

        def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query = query.view(-1, heads, size)
            key, value = key.view(-1, kv_heads, size), value.view(-1, kv_heads, size)
            cache = module.kv_cache
            impl.do_kv_cache_update(module, key, value, cache, self._slots)
            output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            impl.forward(module, query, key, value, cache, now[mode], output)
            return output.view(-1, heads * size)

        return core


class KernelAttention:
    """Our kernel over the paged KV; K and V are written by vLLM's own writer."""

    def __init__(self, engine: Engine, geometry: WindowGeometry) -> None:
        self._engine = engine
        self._geometry = geometry
        self._metadata = StepMetadata(engine)

    @contextmanager
    def round(
        self, plan: Plan, state: ops.DraftState, longest: int
    ) -> Iterator[tuple[Cores, Callable[[], None]]]:
        """See `DraftAttention`; the kernel needs nothing made before a forward."""
        engine, rows = self._engine, len(state.tokens)

        def core_of(layer: int) -> AttentionCore:
            module = engine.view.attention_layer(layer)
            options = self._geometry.attention_options(module, plan.attention(layer) == Mode.WINDOW)

            def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
                key, value = (x.view(rows, -1, module.head_size) for x in (key, value))
                module.impl.do_kv_cache_update(module, key, value, module.kv_cache, state.slots)
                return ops.paged_decode_attention(
                    query.view(rows, -1, module.head_size),
                    engine.paged_kv[layer],
                    state.block_table,
                    state.lengths,
                    max_length=longest,
                    **options,
                ).view(rows, -1)

            return core

        with self._metadata.active({}, state.slots):
            yield core_of, lambda: None


def _callable_directly(module: Any) -> bool:
    """Whether vLLM's Attention.forward would do nothing but write K/V and call the backend."""
    return (
        hasattr(module.impl, "do_kv_cache_update")
        and not module.attn_backend.forward_includes_kv_cache_update
        and getattr(module, "query_quant", None) is None
        and getattr(module, "kv_sharing_target_layer_name", None) is None
        and not getattr(module, "calculate_kv_scales", False)
        and getattr(module, "head_size_v", module.head_size) == module.head_size
    )
