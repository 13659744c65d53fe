# SPDX-License-Identifier: Apache-2.0
"""`greedy_confidence` against softmax and maximum in torch: `python bench_greedy_confidence.py`.

Vocabularies of Llama 3, Qwen 3 and SmolLM2; and the shard of one rank of four with its merge.
"""

from __future__ import annotations

import functools

import torch
from harness import Case, bench_device, is_toy, report

from knapspec_vllm.kernels.greedy_confidence import (
    greedy_confidence,
    greedy_partials,
    merge_greedy,
)
from knapspec_vllm.kernels.reference import greedy_confidence as eager

DEVICE = bench_device()


def softmax_max(logits: torch.Tensor) -> object:
    """What one writes first: three passes over the logits, in float32."""
    return torch.softmax(logits, -1, dtype=torch.float32).max(-1)


def whole(rows: int, vocabulary: int, dtype: torch.dtype) -> Case:
    logits = torch.randn(rows, vocabulary, device=DEVICE).to(dtype)
    return Case(
        f"B{rows} V{vocabulary} {str(dtype).removeprefix('torch.')}",
        functools.partial(greedy_confidence, logits),
        moved_bytes=logits.nbytes,
        baselines={
            "softmax": functools.partial(softmax_max, logits),
            "eager": functools.partial(eager.greedy_confidence, logits),
        },
    )


def sharded(rows: int, vocabulary: int, ranks: int) -> Case:
    logits = torch.randn(rows, vocabulary // ranks, device=DEVICE).to(torch.bfloat16)
    ids = torch.zeros(ranks, rows, dtype=torch.int64, device=DEVICE)
    maximum = torch.zeros(ranks, rows, device=DEVICE)
    total = torch.ones(ranks, rows, device=DEVICE)

    def run() -> object:
        greedy_partials(logits, first_token=0, valid=logits.shape[1])
        return merge_greedy(ids, maximum, total)

    return Case(f"B{rows} V{vocabulary} one rank of {ranks}, merge", run, logits.nbytes)


def cases() -> list[Case]:
    if is_toy():
        return [whole(2, 5000, torch.float32), sharded(2, 8192, 2)]
    sizes = [(v, rows) for v in (49152, 128256, 151936) for rows in (1, 8, 64, 256)]
    found = [whole(rows, vocabulary, torch.bfloat16) for vocabulary, rows in sizes]
    return [*found, whole(64, 128256, torch.float32), sharded(8, 128256, 4)]


if __name__ == "__main__":
    report("greedy_confidence", cases())
