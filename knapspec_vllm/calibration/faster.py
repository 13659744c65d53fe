# SPDX-License-Identifier: Apache-2.0
"""Which of two ways of doing the same is faster on this machine: measured, then kept."""

from __future__ import annotations

import logging
import time

import torch

from knapspec_vllm.calibration.cells import cells_of
from knapspec_vllm.calibration.profiler import draft_step, fake_rows, time_us, uniform_plans
from knapspec_vllm.draft.attention import AttentionPath
from knapspec_vllm.draft.drafter import Drafter
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.head import HeadKind
from knapspec_vllm.draft.screened_head import ScreenedHead

logger = logging.getLogger("vllm.knapspec")

_LARGE = 8
"""Rows of a batch that counts as large."""
_HEAD_REPEATS = 3


@torch.inference_mode()
def faster_attention(engine: Engine, drafter: Drafter, max_rows: int) -> AttentionPath:
    """Which attention path drafts a large batch faster, FULL and WINDOW together.

    The caller puts the drafter on it. On a CPU it is vLLM's backend, unmeasured: the eager twin
    gathers the context for every token, which a C++ kernel that reads it in place never loses to.
    """
    if engine.device.type == "cpu" or not engine.paged_kv:
        return "backend"
    if any(group.backend.get_name() == "FLASHINFER" for group in engine.attention_groups):
        # Its builder keeps one plan of what to read: FULL layers of a draft that has WINDOW ones
        # would read the window. And it waits for the device at every token.
        return "kernel"
    cell = list(cells_of(engine, 1, min(max_rows, _LARGE)))[-1]
    rows = fake_rows(engine, cell, 1)
    plans = uniform_plans(engine.view.num_layers)
    paths: tuple[AttentionPath, ...] = ("backend", "kernel")
    times_us: dict[AttentionPath, float] = {}
    for path in paths:
        drafter.attention_path = path
        times_us[path] = sum(
            min(time_us(engine, draft_step(drafter, plans[kind], rows, 1)))
            for kind in ("draft_full", "draft_window")
        )
    faster = min(paths, key=times_us.__getitem__)
    logger.info(
        "KnapSpec drafts with %s attention (batch %d, context %d: backend %.0f us, kernel %.0f us)",
        faster, cell.rows, cell.context, times_us["backend"], times_us["kernel"],
    )  # fmt: skip
    return faster


@torch.inference_mode()
def faster_head(engine: Engine, drafter: Drafter, screen: ScreenedHead, max_rows: int) -> HeadKind:
    """Which head finds the tokens of one row and of a large batch faster, both together.

    The caller gives it to the drafter. Each is timed behind a draft forward that ended with the
    other: what a forward leaves of its weights in the caches is what drafting leaves there.
    """
    cells = list(cells_of(engine, 1, min(max_rows, _LARGE)))
    width = engine.vllm_config.model_config.get_hidden_size()
    # Each with what the forward before it ends with.
    heads: dict[HeadKind, tuple[ScreenedHead | None, ScreenedHead | None]] = {
        "full": (None, screen),
        "screened": (screen, None),
    }
    times_us: dict[HeadKind, float] = dict.fromkeys(heads, 0.0)
    for cell in {cells[0], cells[-1]}:
        step = draft_step(
            drafter,
            uniform_plans(engine.view.num_layers)["draft_full"],
            fake_rows(engine, cell, 1),
            1,
            captured=False,
        )
        hidden = torch.randn(cell.rows, width, device=engine.device).to(engine.dtype)
        fastest = dict.fromkeys(heads, float("inf"))
        for _ in range(1 + _HEAD_REPEATS):  # the first is slower, so never the fastest
            for kind, (head, before) in heads.items():
                drafter.head.screen = before
                step()
                engine.synchronize()
                drafter.head.screen = head
                start = time.perf_counter()
                drafter.head(hidden)
                engine.synchronize()
                fastest[kind] = min(fastest[kind], (time.perf_counter() - start) * 1e6)
        for kind in heads:
            times_us[kind] += fastest[kind]
    faster = min(heads, key=times_us.__getitem__)
    logger.info(
        "KnapSpec drafts with the %s head (1 and %d rows together: full %.0f us, screened %.0f us)",
        faster, cells[-1].rows, times_us["full"], times_us["screened"],
    )  # fmt: skip
    return faster
