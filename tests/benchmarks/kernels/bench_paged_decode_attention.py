# SPDX-License-Identifier: Apache-2.0
"""Bandwidth of `paged_decode_attention`: every visible K and V is read once, so bytes are all.

The goal is 85% of the copy bandwidth from batch 8 and 8k tokens on. Baselines: vLLM's Triton
unified attention with the buffers its backend gives it (for windows over a block table of the kept
blocks only, as vLLM would be used), and at one small size the eager twin.
"""

from collections.abc import Callable

import torch
from harness import Case, bench_device, is_toy, report

from knapspec_vllm import ops
from knapspec_vllm.kernels.paged_kv import PagedKV
from knapspec_vllm.kernels.reference.paged_decode_attention import paged_decode_attention as eager

QUERY_HEADS, KV_HEADS, DIM, BLOCK_SIZE = (4, 1, 64, 16) if is_toy() else (32, 8, 128, 16)
SCALE = DIM**-0.5
# rows, tokens a row
SIZES = [(2, 48)] if is_toy() else [(1, 8192), (8, 2048), (8, 8192), (32, 8192), (64, 4096)]
# sinks, window in tokens; of the sizes whose context is longer
WINDOW = (16, 20) if is_toy() else (64, 1024)
SEGMENTS = 16  # vLLM's NUM_PAR_SOFTMAX_SEGMENTS
LARGEST_2D_GRID = 128  # vLLM's MIN_LAUNCH_GRID_SIZE_2D: larger grids are not split


def make_cache(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, PagedKV]:
    """One cache that all cases read from, in the layout of vLLM's Triton backend."""
    blocks = max(rows * tokens for rows, tokens in SIZES) // BLOCK_SIZE
    cache = torch.empty(blocks, 2, BLOCK_SIZE, KV_HEADS, DIM, dtype=torch.bfloat16, device=device)
    cache = cache.normal_().to(dtype)
    return cache, PagedKV.of_views(cache[:, 0], cache[:, 1])


def make_case(
    name: str,
    cache: torch.Tensor,
    kv: PagedKV,
    lengths: list[int],
    *,
    windowed: bool = False,
    max_length: int | None = None,
) -> Case:
    """max_length: the longest context of the model, where a graph was captured for any length."""
    device, rows, longest = cache.device, len(lengths), max(lengths)
    longest_blocks = longest // BLOCK_SIZE
    table = torch.randperm(len(cache), device=device)[: rows * longest_blocks]
    table = table.view(rows, longest_blocks).to(torch.int32)
    bound = max_length or longest
    table = torch.nn.functional.pad(table, (0, bound // BLOCK_SIZE - longest_blocks))
    query = torch.randn(rows, QUERY_HEADS, DIM, dtype=torch.bfloat16, device=device)
    sinks, window = WINDOW if windowed else (0, 0)
    arguments = (query, kv, table, torch.tensor(lengths, dtype=torch.int32, device=device), SCALE)
    options = dict(max_length=bound, sinks=sinks, window=window)

    kept, kept_table = list(lengths), table
    if windowed:
        assert len(set(lengths)) == 1
        first = max(sinks, (longest - window) // BLOCK_SIZE * BLOCK_SIZE)
        kept = [n - (first - sinks) for n in lengths]
        kept_table = torch.cat(
            [table[:, : sinks // BLOCK_SIZE], table[:, first // BLOCK_SIZE :]], dim=1
        ).contiguous()
    token_bytes = 2 * KV_HEADS * DIM * cache.itemsize
    baselines: dict[str, Callable[[], object]] = {}
    if rows * longest <= 2**16:
        baselines["eager"] = lambda: eager(*arguments, **options)
    if not is_toy() and cache.dtype == query.dtype:
        lengths_kept = torch.tensor(kept, dtype=torch.int32, device=device)
        want = ops.paged_decode_attention(*arguments, **options)
        run = vllm_unified_attention(
            query, cache, kept_table, lengths_kept, max_length or max(kept)
        )
        if run is not None and checked(run, want):
            baselines["vllm triton"] = run
    return Case(
        name,
        lambda: ops.paged_decode_attention(*arguments, **options),
        moved_bytes=sum(kept) * token_bytes + 2 * query.nbytes,
        flops=sum(kept) * QUERY_HEADS * DIM * 4,
        baselines=baselines,
    )


def vllm_unified_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
) -> Callable[[], torch.Tensor] | None:
    """vLLM's kernel as its Triton backend calls it for a decode batch; None where it is missing."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError as error:
        print(f"no vLLM baseline: {error}")
        return None
    rows, heads, dim = query.shape
    out = torch.empty_like(query)
    sums = torch.empty(rows, heads, SEGMENTS, dim, device=query.device)
    maximum, total = sums.new_empty(2, rows, heads, SEGMENTS)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    one = torch.ones(1, device=query.device)

    def run() -> torch.Tensor:
        unified_attention(
            q=query,
            k=cache[:, 0],
            v=cache[:, 1],
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=longest,
            softmax_scale=SCALE,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=one,
            v_descale=one,
            seq_threshold_3D=LARGEST_2D_GRID // KV_HEADS,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=sums,
            softmax_segm_max=maximum,
            softmax_segm_expsum=total,
        )
        return out

    return run


def checked(run: Callable[[], torch.Tensor], want: torch.Tensor) -> bool:
    """Whether a baseline runs with this vLLM and computes the same."""
    try:
        torch.testing.assert_close(run(), want, atol=2e-2, rtol=2e-2)
    except (AssertionError, TypeError, RuntimeError) as error:
        print(f"vLLM baseline left out: {error}")
        return False
    return True


def make_cases() -> list[Case]:
    device = bench_device()
    cache, kv = make_cache(torch.bfloat16, device)
    cases = [make_case(f"B{b}-L{n}", cache, kv, [n] * b) for b, n in SIZES]
    cases += [
        make_case(f"B{b}-L{n}-window", cache, kv, [n] * b, windowed=True)
        for b, n in SIZES
        if n > sum(WINDOW)
    ]
    rows, tokens = SIZES[-1]
    uneven = [tokens] * (rows // 8 or 1) + [tokens // 4] * (rows - (rows // 8 or 1))
    cases.append(make_case(f"B{rows}-uneven", cache, kv, uneven))
    rows, tokens = SIZES[min(2, len(SIZES) - 1)]
    cases.append(make_case(f"B{rows}-L{tokens}-of-128k", cache, kv, [tokens] * rows,
                           max_length=128 if is_toy() else 2**17))  # fmt: skip
    cache, kv = make_cache(torch.float8_e4m3fn, device)
    cases.append(make_case(f"B{rows}-L{tokens}-fp8", cache, kv, [tokens] * rows))
    return cases


if __name__ == "__main__":
    report("paged_decode_attention", make_cases())
