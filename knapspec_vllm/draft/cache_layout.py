# SPDX-License-Identifier: Apache-2.0
"""Reads K and V back from an attention backend's paged cache, whatever its layout.

Backends store blocks in layouts of their own: FlashAttention token-major, CPU kernels in tiles
packed for AMX or AVX-512. Instead of naming layouts, the backend's own writer is asked: known
values are written into a scratch cache of two blocks, and where each (token, head, dim) landed is
the layout. One code path then reads every backend whose writer only moves elements around, and the
kernels get it as `ops.PagedKV`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from knapspec_vllm import ops

logger = logging.getLogger("vllm.knapspec")

#: Ids are written in base 8 as digits 1..8, which every cache dtype down to fp8 e5m2 holds exactly.
_BASE = 8


class UnknownCacheLayoutError(RuntimeError):
    """The backend's cache writer is not a rearrangement that can be read back."""


class CacheLayout:
    """Element offsets of K and V inside one cache block of an attention layer.

    Raises:
        UnknownCacheLayoutError: the backend has no separate writer, or reading back failed.
    """

    def __init__(self, layer: Any, block_size: int) -> None:
        """layer: a vLLM `Attention` module with a bound kv_cache; block_size in tokens."""
        self.block_size = block_size
        self.num_heads = layer.num_kv_heads
        self.head_dim = layer.head_size
        self.fp8 = _fp8_dtype(layer)
        impl = layer.impl
        if (
            not hasattr(impl, "do_kv_cache_update")
            or layer.attn_backend.forward_includes_kv_cache_update
        ):
            raise UnknownCacheLayoutError(
                f"{type(impl).__name__} writes its KV cache inside the attention kernel"
            )
        cache = layer.kv_cache
        #: Axis of `cache` that counts blocks: the one as long as the whole cache has blocks.
        self._block_axis = _block_axis(cache, block_size, self.num_heads * self.head_dim * 2)
        offsets = self._in_memory(cache, self._probe(layer, cache))
        shape = (2, block_size, self.num_heads, self.head_dim)
        self._key, self._value = (_addresses(table) for table in offsets.view(shape))

    def bind(self, layer: Any) -> ops.PagedKV:
        """K and V of a layer whose cache has this layout; a view, valid as long as the cache is."""
        cache = layer.kv_cache
        span = 1 + sum((n - 1) * s for n, s in zip(cache.shape, cache.stride(), strict=True))
        flat = cache.as_strided((span,), (1,))
        return ops.PagedKV(
            cache=flat if self.fp8 is None else flat.view(self.fp8),
            block_stride=cache.stride(self._block_axis),
            block_size=self.block_size,
            key=self._key,
            value=self._value,
            key_scale=1.0 if self.fp8 is None else float(layer._k_scale_float),
            value_scale=1.0 if self.fp8 is None else float(layer._v_scale_float),
        )

    def _in_memory(self, cache: torch.Tensor, logical: torch.Tensor) -> torch.Tensor:
        """Offsets in memory of elements numbered in the logical order of a block's axes."""
        rest = [axis for axis in range(cache.dim()) if axis != self._block_axis]
        places = torch.zeros_like(logical)
        for axis in reversed(rest):
            places += logical % cache.shape[axis] * cache.stride(axis)
            logical = logical // cache.shape[axis]
        return places

    def _blocks_first(self, cache: torch.Tensor) -> torch.Tensor:
        """[num_blocks, elements of a block], in the logical order of the remaining axes."""
        return cache.movedim(self._block_axis, 0).reshape(cache.shape[self._block_axis], -1)

    def _probe(self, layer: Any, cache: torch.Tensor) -> torch.Tensor:
        """Logical offsets [2 * block_size * heads * head_dim] int64 of K's and V's elements."""
        scratch = _empty_blocks(cache, self._block_axis, count=2)
        count = self.block_size * self.num_heads * self.head_dim
        device = cache.device
        # Every element gets an id, written digit by digit; digits start at 1, so 0 means untouched.
        rest = torch.arange(2 * count, device=device)
        found = torch.zeros(self._blocks_first(scratch).shape[1], dtype=torch.int64, device=device)
        written = torch.ones_like(found, dtype=torch.bool)
        # Into block 1, so that a writer that ignores the slots does not pass for one that works.
        slots = torch.arange(self.block_size, device=device) + self.block_size
        place = 1
        while place < 2 * count:
            digits = (rest % _BASE + 1).view(2, self.block_size, self.num_heads, self.head_dim)
            scratch.zero_()
            self._write(layer, digits, scratch, slots)
            seen = self._blocks_first(scratch)[1]
            seen = (seen.view(self.fp8) if self.fp8 is not None else seen).float().round().long()
            written &= seen > 0
            found += (seen - 1) * place
            rest, place = rest // _BASE, place * _BASE
        offsets = torch.full((2 * count,), -1, dtype=torch.int64, device=device)
        where = (written & (found >= 0) & (found < 2 * count)).nonzero()[:, 0]
        offsets[found[where]] = where
        if bool((offsets < 0).any()):
            raise UnknownCacheLayoutError(
                f"{type(layer.impl).__name__} does not store K and V as plain elements"
            )
        return offsets

    def _write(
        self, layer: Any, digits: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor
    ) -> None:
        dtype = torch.bfloat16 if self.fp8 is not None else scratch.dtype
        key, value = digits.to(dtype)
        if self.fp8 is not None:  # the writer divides by the scales; store plain digits
            key, value = key * layer._k_scale_float, value * layer._v_scale_float
        layer.impl.do_kv_cache_update(layer, key, value, scratch, slots)


def _addresses(
    # [block_size, heads, head_dim] int64
    offsets: torch.Tensor,
) -> ops.Addresses:
    """The same as one term per coordinate, which every known layout is (tiles included)."""
    token = offsets[:, 0, 0]
    head, dim = offsets[0, :, 0] - token[0], offsets[0, 0] - token[0]
    if not torch.equal(offsets, token[:, None, None] + head[:, None] + dim):
        raise UnknownCacheLayoutError("the place of an element is not a sum over its coordinates")
    steps = [_step(table) for table in (token, head, dim)]
    strides = None if None in steps else (int(token[0]), *steps)
    head, dim = head.int().contiguous(), dim.int().contiguous()
    return ops.Addresses(token.contiguous(), head, dim, strides)  # type: ignore[arg-type]


def _step(table: torch.Tensor) -> int | None:
    """The difference of consecutive entries if it is one, else None."""
    steps = set(table.diff().tolist()) or {0}
    return steps.pop() if len(steps) == 1 else None


def _empty_blocks(cache: torch.Tensor, block_axis: int, count: int) -> torch.Tensor:
    """A cache of `count` blocks with the axis order in memory of `cache` (NHD or HND)."""
    shape = list(cache.shape)
    shape[block_axis] = count
    order = sorted(range(cache.dim()), key=lambda axis: -cache.stride(axis))
    dense = torch.empty([shape[axis] for axis in order], dtype=cache.dtype, device=cache.device)
    return dense.permute([order.index(axis) for axis in range(cache.dim())])


def _fp8_dtype(layer: Any) -> torch.dtype | None:
    name = str(getattr(layer, "kv_cache_dtype", "auto"))
    if not name.startswith("fp8"):
        return None
    return torch.float8_e5m2 if name.endswith("e5m2") else torch.float8_e4m3fn


def _block_axis(cache: torch.Tensor, block_size: int, elements_per_token: int) -> int:
    """The axis over blocks: dropping it must leave exactly one block's elements."""
    per_block = block_size * elements_per_token
    for axis in range(cache.dim()):
        if cache.numel() == cache.shape[axis] * per_block:
            return axis
    raise UnknownCacheLayoutError(
        f"a KV cache of shape {tuple(cache.shape)} does not hold {per_block} elements a block"
    )


def _check_kernels_read(layout: CacheLayout, device: torch.device) -> None:
    if (
        layout.fp8 == torch.float8_e4m3fn
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) < (8, 9)
    ):
        raise UnknownCacheLayoutError(
            "Triton reads fp8 e4m3 from compute capability 8.9 on; fp8_e5m2 and auto are read here"
        )


def bind_layers(layers: list[Any], block_size: int) -> tuple[ops.PagedKV, ...]:
    """K and V of every layer; empty, with a warning, where the cache cannot be read."""
    try:
        # One probe serves all layers: they share backend, shape and dtype (one KV cache group).
        layout = CacheLayout(layers[0], block_size)
        _check_kernels_read(layout, layers[0].kv_cache.device)
    except UnknownCacheLayoutError as error:
        logger.warning(
            "KnapSpec cannot solve for plans on this attention backend (%s); it will use stored "
            "or forced plans only",
            error,
        )
        return ()
    return tuple(layout.bind(layer) for layer in layers)
