# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of a whole drafting round, start and 8 steps: `python bench_draft_advance.py`.

Latency is all that matters: a round moves some kilobytes. The baseline is the eager twin, captured
in a CUDA graph like the kernel, so that the difference is work on the device, not launches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Case, bench_device, is_toy, report

import knapspec_vllm.kernels.draft_advance as kernel
from knapspec_vllm.kernels.draft_state import DraftState
from knapspec_vllm.kernels.reference import draft_advance as eager

DEVICE = bench_device()
STEPS = 2 if is_toy() else 8


def a_round(rows: int, window_tokens: int) -> Case:
    blocks = 64 if is_toy() else 8192
    table = torch.randint(0, 1 << 20, (rows, blocks), dtype=torch.int32, device=DEVICE)
    state = DraftState.allocate(
        rows,
        STEPS,
        table,
        block_size=16,
        max_model_len=blocks * 16,
        sink_blocks=4,
        window_tokens=window_tokens,
    )
    start = torch.randint(0, blocks * 16 - 16, (rows,), device=DEVICE)
    state.limits.fill_(STEPS)
    token_ids = torch.randint(0, 128256, (rows,), device=DEVICE)
    confidence = torch.ones(rows, device=DEVICE)

    def play(
        draft_start: Callable[[DraftState], None], draft_advance: Callable[..., None]
    ) -> Callable[[], None]:
        def run() -> None:
            state.positions.copy_(start)
            draft_start(state)
            for _ in range(STEPS):
                draft_advance(state, token_ids, confidence, threshold=0.0)

        return run

    scalars = 3 * 8 + 4 * 4 + 1  # tokens, positions, slots; lengths, counts, limits, confidence
    window = 0 if state.window_table is None else 2 * 4 * state.window_table.shape[1] + 4
    return Case(
        f"B{rows} {'window ' + str(window_tokens) if window_tokens else 'no window'}",
        play(kernel.draft_start, kernel.draft_advance),
        moved_bytes=(STEPS + 1) * rows * (2 * scalars + window),
        baselines={"eager": play(eager.draft_start, eager.draft_advance)},
    )


def cases() -> list[Case]:
    sizes = (2,) if is_toy() else (1, 8, 64, 256, 512)
    return [a_round(rows, window) for window in (0, 512) for rows in sizes]


if __name__ == "__main__":
    report("draft_advance", cases())
