# SPDX-License-Identifier: Apache-2.0
"""Speed of `branch_attention`, which matrix products bound where there are many branches.

Baselines, all on the same inputs: "dense" gathers K and V and runs one call of torch's attention
over the prefix and the tails of all branches with a block-diagonal mask; "flash prefix" is torch's
attention without a mask over a prefix gathered beforehand, which leaves out the tails and is what a
kernel of this kind can hope for; "eager" is the twin.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Case, bench_device, is_toy, report
from torch.nn.functional import scaled_dot_product_attention

from knapspec_vllm import ops
from knapspec_vllm.kernels.paged_kv import PagedKV
from knapspec_vllm.kernels.reference.branch_attention import branch_attention as eager

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Size:
    """One call of the solver: `branches` times `refs` tokens of each of `rows` rows."""

    name: str
    branches: int
    rows: int
    refs: int
    prefix: int
    query_heads: int = 32
    heads: int = 8
    dim: int = 128
    sinks: int = 0
    window: int = 0

    @property
    def visible(self) -> int:
        """Prefix keys that a token sees."""
        if not self.window:
            return self.prefix
        first = (self.prefix + self.refs - self.window) // BLOCK_SIZE * BLOCK_SIZE
        return self.prefix - max(first - self.sinks, 0)


SIZES = [
    Size("8B-N33-R32-P2k", 33, 1, 32, 2048),
    Size("8B-N33-R32-P8k", 33, 1, 32, 8192),
    Size("8B-N33-R32-P32k", 33, 1, 32, 32768),
    Size("8B-N33-S4-R8-P8k", 33, 4, 8, 8192),
    Size("8B-N33-R32-P8k-window", 33, 1, 32, 8192, sinks=64, window=512),
    Size("8B-N5-R16-P8k", 5, 1, 16, 8192),
    Size("8B-N1-R1-P8k", 1, 1, 1, 8192),
    Size("smollm2-N33-R32-P2k", 33, 1, 32, 2000, 9, 3, 64),
    Size("gemma2-N33-R32-P4k", 33, 1, 32, 4096, 8, 4, 256),
]
TOY_SIZES = [Size("toy-N3-R4-P40", 3, 2, 4, 40, 4, 2, 32)]


def case(size: Size) -> Case:
    device, dtype = bench_device(), torch.bfloat16
    width = -(-size.prefix // BLOCK_SIZE)
    blocks, tokens = size.rows * width, size.rows * size.refs
    cache = torch.randn(blocks, 2, BLOCK_SIZE, size.heads, size.dim, device=device, dtype=dtype)
    kv = PagedKV.of_views(cache[:, 0], cache[:, 1])
    table = torch.randperm(blocks, device=device).view(size.rows, width).int()
    lengths = torch.full((size.rows,), size.prefix, dtype=torch.int32, device=device)
    split = [size.query_heads, size.heads, size.heads]
    shape = (size.branches, tokens, sum(split), size.dim)
    query, key, value = torch.randn(shape, device=device, dtype=dtype).split(split, 2)
    inputs = (query, kv, table, lengths, key, value, size.dim**-0.5)
    options = dict(max_prefix=size.prefix, sinks=size.sinks, window=size.window)

    per_key = 4 * size.branches * tokens * size.query_heads * size.dim
    kept = kv.cache.itemsize * 2 * size.rows * size.visible * size.heads * size.dim
    baselines: dict[str, Callable[[], object]] = {}
    if not size.window:
        dense = _dense(size, *inputs)
        torch.testing.assert_close(
            dense(), ops.branch_attention(*inputs, **options), atol=2e-2, rtol=2e-2
        )
        baselines = {"dense": dense, "flash prefix": _prefix_only(size, *inputs)}
    return Case(
        size.name,
        lambda: ops.branch_attention(*inputs, **options),
        moved_bytes=2 * query.nbytes + key.nbytes + value.nbytes + kept,
        flops=int(per_key * (size.visible + (size.refs + 1) / 2)),
        baselines=baselines | {"eager": lambda: eager(*inputs, **options)},
    )


def _rows_first(size: Size, tensor: torch.Tensor) -> torch.Tensor:
    """[N, S * R, heads, D] to [S, heads, N * R, D]."""
    rows = tensor.unflatten(1, (size.rows, size.refs)).transpose(0, 1)
    return rows.flatten(1, 2).transpose(1, 2)


def _dense(size, query, kv, table, lengths, key, value, scale) -> Callable[[], torch.Tensor]:
    """Tails of all branches as keys of all branches, hidden by a mask made beforehand."""
    number = torch.arange(size.branches * size.refs, device=query.device)
    branch, place = number // size.refs, number % size.refs
    own = (branch[:, None] == branch) & (place[:, None] >= place)
    mask = torch.nn.functional.pad(own, (size.prefix, 0), value=True)
    group = size.query_heads // size.heads

    def run() -> torch.Tensor:
        found = []
        for prefix, tail in zip(kv.gather(table, query.dtype), (key, value), strict=True):
            prefix = prefix[:, : size.prefix].transpose(1, 2)
            keys = torch.cat([prefix, _rows_first(size, tail)], 2)
            found.append(keys.repeat_interleave(group, 1))
        queries, (keys, values) = _rows_first(size, query), found
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        out = out.transpose(1, 2).unflatten(1, (size.branches, size.refs)).transpose(0, 1)
        return out.flatten(1, 2)

    return run


def _prefix_only(size, query, kv, table, lengths, key, value, scale) -> Callable[[], torch.Tensor]:
    rows = _rows_first(size, query).contiguous()
    keys, values = [
        prefix[:, : size.prefix].transpose(1, 2).contiguous()
        for prefix in kv.gather(table, query.dtype)
    ]
    return lambda: scaled_dot_product_attention(rows, keys, values, scale=scale, enable_gqa=True)


if __name__ == "__main__":
    report("branch_attention", [case(size) for size in (TOY_SIZES if is_toy() else SIZES)])
