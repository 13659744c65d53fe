# SPDX-License-Identifier: Apache-2.0
"""Where the K and V of one attention layer lie in a paged cache, in a form kernels can address.

Element (block, token, head, dim) of K lies at
    cache[block * block_stride + key.token[token] + key.head[head] + key.dim[dim]]
and V likewise. Sums of one term per coordinate cover token-major and head-major layouts, K and V in
one tensor or two, and the CPU backend's tiles packed for AMX or AVX-512.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Addresses:
    """Element offsets within a block, one table per coordinate; all on the cache's device."""

    # [block_size] int64: V may start more than 2^31 elements behind K
    token: torch.Tensor
    # [Hkv] int32
    head: torch.Tensor
    # [D] int32
    dim: torch.Tensor
    #: (first element, per token, per head, per dim) if the tables are multiples, else None.
    strides: tuple[int, int, int, int] | None

    #: Offset of a block's first element, and elements from it to behind the last one.
    first: int = field(init=False)
    span: int = field(init=False)

    def __post_init__(self) -> None:
        tables = (self.token, self.head, self.dim)
        first = sum(int(table.min()) for table in tables)
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "span", sum(int(table.max()) for table in tables) - first + 1)

    @functools.cached_property
    def inside(self) -> torch.Tensor:
        """All offsets from the first element, flattened from [Hkv, block_size, D]; int64."""
        offsets = self.token[:, None] + self.head[:, None, None] + self.dim - self.first
        return offsets.flatten()

    @classmethod
    def strided(
        cls, start: int, sizes: tuple[int, int, int], strides: tuple[int, int, int], device: str
    ) -> Addresses:
        """Of K or V in a plain layout. sizes and strides (elements): of token, head, dim."""
        token, head, dim = (
            torch.arange(size, device=device) * stride
            for size, stride in zip(sizes, strides, strict=True)
        )
        return cls(token + start, head.int(), dim.int(), (start, *strides))


@dataclass(frozen=True)
class PagedKV:
    """K and V of one layer."""

    # [elements], any float dtype, the whole span of the layer's cache
    cache: torch.Tensor
    #: Elements from a block to the next; may exceed what a block holds (layers interleaved).
    block_stride: int
    #: Tokens a block holds.
    block_size: int
    key: Addresses
    value: Addresses
    #: Stored value times scale is the value (fp8 caches).
    key_scale: float = 1.0
    value_scale: float = 1.0

    @classmethod
    def of_views(
        cls,
        # [blocks, block_size, Hkv, D], any strides
        key: torch.Tensor,
        # [blocks, block_size, Hkv, D], any strides, the same block stride and storage as `key`
        value: torch.Tensor,
        key_scale: float = 1.0,
        value_scale: float = 1.0,
    ) -> PagedKV:
        """From two strided views of one cache, for example `cache[:, 0]` and `cache[:, 1]`."""
        if key.stride(0) != value.stride(0) or key.shape != value.shape:
            raise ValueError("key and value must be views of one cache with the same block stride")
        base = min(key.storage_offset(), value.storage_offset())
        _, block_size, heads, dim = key.shape
        last = max(
            view.storage_offset()
            + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
            for view in (key, value)
        )
        flat = torch.empty(0, dtype=key.dtype, device=key.device)
        flat.set_(key.untyped_storage(), base, (last + 1 - base,), (1,))
        key_addresses, value_addresses = (
            Addresses.strided(
                view.storage_offset() - base,
                (block_size, heads, dim),
                (view.stride(1), view.stride(2), view.stride(3)),
                str(view.device),
            )
            for view in (key, value)
        )
        return cls(
            flat, key.stride(0), block_size, key_addresses, value_addresses, key_scale, value_scale
        )

    @property
    def num_heads(self) -> int:
        return len(self.key.head)

    @property
    def head_dim(self) -> int:
        return len(self.key.dim)

    def gather(
        self,
        # [..., W] int
        block_table: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the listed blocks, each [..., W * block_size, Hkv, D] in `dtype`.

        In memory the heads are outermost, as matrix products want them.
        """
        *lead, width = block_table.shape
        shape = (self.num_heads, width * self.block_size, self.head_dim)
        # Bytes, because copying single elements is not implemented for float8 everywhere.
        raw = self.cache.view(torch.uint8) if self.cache.itemsize == 1 else self.cache
        found = []
        for where, scale in ((self.key, self.key_scale), (self.value, self.value_scale)):
            count = (len(raw) - where.first - where.span) // self.block_stride + 1
            blocks = raw.as_strided(
                (count, where.span), (self.block_stride, 1), raw.storage_offset() + where.first
            )
            blocks = blocks.index_select(0, block_table.flatten())
            sizes = (len(blocks), self.num_heads, self.block_size, self.head_dim)
            if where.strides is None:
                picked = blocks.index_select(1, where.inside).view(sizes)
            else:  # whole rows of elements are copied, not single ones: up to 15 times faster
                _, token, head, dim = where.strides
                picked = blocks.as_strided(sizes, (where.span, head, token, dim))
            picked = (
                picked.view(self.cache.dtype).unflatten(0, (math.prod(lead), width)).transpose(1, 2)
            )
            values = torch.empty(picked.shape, dtype=dtype, device=raw.device).copy_(picked)
            values = values.view(*lead, *shape)
            found.append((values if scale == 1.0 else values.mul_(scale)).transpose(-3, -2))
        return found[0], found[1]
