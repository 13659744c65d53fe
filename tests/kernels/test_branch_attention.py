# SPDX-License-Identifier: Apache-2.0
"""`branch_attention` against softmax attention, token by token over keys listed by position."""

import dataclasses

import pytest
import torch

from knapspec_vllm import ops
from knapspec_vllm.kernels.paged_kv import Addresses, PagedKV
from tests.helpers_kernels import assert_close

pytestmark = pytest.mark.kernels

# float32: only the order of sums differs. 16 bits: weights and result are rounded to the dtype
# (2^-9 or 2^-12 relative), on the CPU also the two parts it merges; results stay below 4.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# branches, tokens of a row, prefix of each row, Hq, Hkv, D, block size
SHAPES = {
    "one-token-no-prefix": (1, 1, [0], 1, 1, 32, 16),
    "ragged-rows-one-empty": (3, 5, [40, 0, 17], 4, 2, 32, 16),
    "weird-tiles-span-branches": (5, 7, [63], 9, 3, 17, 5),
    "tail-of-several-tiles": (2, 37, [20], 2, 1, 16, 16),
    "splits": (2, 3, [700, 20], 2, 1, 16, 32),
    "mqa-dim100": (4, 3, [33], 6, 1, 100, 8),
    "mha-dim256": (1, 2, [50], 2, 2, 256, 16),
}
# sinks and window in blocks (so that every block size works), sliding window and cap as they are
MODES = {
    "full": (0, 0.0, 0, 0.0),
    "window-and-sinks": (1, 1.5, 0, 0.0),
    "sliding": (0, 0.0, 29, 0.0),
    "sliding-shorter-than-tails": (0, 0.0, 3, 0.0),
    "cap": (0, 0.0, 0, 3.0),
    "all-at-once": (2, 2.0, 37, 2.0),
}
FP32, BF16, FP16 = TOLERANCE


def make_inputs(
    device, branches, refs, prefixes, hq=4, hkv=2, dim=32, block_size=16, dtype=FP32, cache=None
):
    """The tensors in the order of the op; blocks of a row are scattered, rows share none."""
    rows, width = len(prefixes), -(-max(prefixes) // block_size) + 2
    # [blocks, 2, block_size, Hkv, D], as vLLM's GPU backends have it
    memory = torch.randn(rows * width, 2, block_size, hkv, dim).to(device, cache or dtype)
    table = torch.randperm(rows * width).view(rows, width).to(device, torch.int32)
    # Slices of one tensor, as vLLM's QKV projection gives them
    qkv = torch.randn(branches, rows * refs, hq + 2 * hkv, dim).to(device, dtype)
    query, key, value = qkv.split([hq, hkv, hkv], 2)
    kv = PagedKV.of_views(memory[:, 0], memory[:, 1])
    return query, kv, table, torch.tensor(prefixes, device=device), key, value


def read(kv: PagedKV, where: Addresses, blocks: list[int], slots: list[int]) -> torch.Tensor:
    """[keys, Hkv, D] float32, by the formula in paged_kv.py."""
    start = torch.tensor(blocks).long() * kv.block_stride + where.token.cpu().long()[slots]
    index = start.to(where.dim.device)[:, None, None] + where.head[:, None] + where.dim
    raw = kv.cache.view(torch.uint8) if kv.cache.itemsize == 1 else kv.cache
    return raw[index].view(kv.cache.dtype).float()


def naive(inputs, scale, sinks=0, window=0, sliding_window=0, soft_cap=0.0):
    """Token by token: the visible keys as Python lists, then plain attention in float32."""
    query, kv, table, prefixes, tail_key, tail_value = inputs
    branches, tokens, hq, _ = query.shape
    refs, group = tokens // len(table), hq // kv.num_heads
    result = torch.zeros_like(query, dtype=torch.float32)
    for row, prefix in enumerate(prefixes.tolist()):
        blocks = [int(table[row, p // kv.block_size]) for p in range(prefix)]
        slots = [p % kv.block_size for p in range(prefix)]
        keys = read(kv, kv.key, blocks, slots) * kv.key_scale
        values = read(kv, kv.value, blocks, slots) * kv.value_scale
        first = max(sinks, (prefix + refs - window) // kv.block_size * kv.block_size)
        for r in range(refs):
            oldest = max(0, prefix + r + 1 - sliding_window) if sliding_window else 0
            old = [p for p in range(oldest, prefix) if not window or p < sinks or p >= first]
            new = [row * refs + t for t in range(r + 1) if prefix + t >= oldest]
            for branch in range(branches):
                key = torch.cat([keys[old], tail_key[branch, new].float()])
                value = torch.cat([values[old], tail_value[branch, new].float()])
                key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
                scores = (key * query[branch, row * refs + r].float()).sum(-1) * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                result[branch, row * refs + r] = (scores.softmax(0)[:, :, None] * value).sum(0)
    return result.to(query.dtype)


def attend(inputs, scale=0.2, max_prefix=None, **mode):
    bound = int(inputs[3].max()) if max_prefix is None else max_prefix
    return ops.branch_attention(*inputs, scale, max_prefix=bound, **mode)


def check(inputs, scale=0.2, max_prefix=None, tolerance=None, **mode):
    got = attend(inputs, scale, max_prefix, **mode)
    assert got.dtype is inputs[0].dtype
    assert_close("out", naive(inputs, scale, **mode), got, tolerance or TOLERANCE[got.dtype])
    return got


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_naive_attention(implementation, device, shape, mode):
    sinks, window, sliding, cap = mode
    inputs, block_size = make_inputs(device, *shape), shape[-1]
    sinks, window = sinks * block_size, int(window * block_size)
    check(inputs, sinks=sinks, window=window, sliding_window=sliding, soft_cap=cap)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0], ids=["plain", "cap"])
def test_16_bits(implementation, device, dtype, soft_cap):
    """Tiles of 128 query rows: 5 branches of 11 tokens and 3 heads need two. And splits."""
    inputs = make_inputs(device, 5, 11, [200, 61], 6, 2, 64, dtype=dtype)
    check(inputs, sinks=16, window=100, soft_cap=soft_cap)
    inputs = make_inputs(device, 2, 3, [700], 4, 1, 64, dtype=dtype)
    check(inputs, sliding_window=650, soft_cap=soft_cap)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_fp8_cache_with_scales(implementation, device, cache, dtype):
    """The scales are those of the cache: the tail has none."""
    query, kv, *rest = make_inputs(device, 3, 4, [70, 40], dtype=dtype, cache=cache)
    kv = dataclasses.replace(kv, key_scale=0.5, value_scale=1.25)
    check((query, kv, *rest), tolerance=1.25 * TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_first_visible_block_moves_at_every_length(implementation, device, bits):
    """Off-by-one at a block's edge: prefixes around the point where the window leaves the sinks."""
    inputs = [*make_inputs(device, 2, 3, [*range(9), *range(16, 27)], 1, 1, 16, 4)]
    inputs[3] = inputs[3].to(bits)
    check(inputs, sinks=8, window=11)
    check(inputs, sinks=8, window=11, sliding_window=14)


def test_window_within_the_tail_or_over_everything(implementation, device):
    """window < R: of the prefix only the sinks remain, and no negative number of other keys."""
    inputs = make_inputs(device, 2, 19, [0, 3, 8, 9, 30], 2, 1, 16, 4)
    check(inputs, window=3)
    check(inputs, sinks=8, window=3, sliding_window=22)
    for size in (48, 49, 50):  # of the longest row's 49 tokens
        check(inputs, sliding_window=size)
        check(inputs, window=size)


def test_bound_far_above_the_prefixes(implementation, device):
    """Under a CUDA graph the bound is the longest context: most splits then have no keys."""
    query, kv, table, *rest = make_inputs(device, 2, 3, [40, 0, 1], 2, 1)
    table = torch.nn.functional.pad(table, (0, 250))
    check((query, kv, table, *rest), max_prefix=4000)


def test_no_prefix_anywhere(implementation, device):
    query, kv, table, *rest = make_inputs(device, 3, 5, [0, 0])
    check((query, kv, table, *rest), max_prefix=0)
    check((query, kv, table[:, :0], *rest), max_prefix=0, sinks=16, window=16)
    check((query, kv, table, *rest), max_prefix=64)


def test_no_branches(implementation, device):
    query, kv, table, prefixes, key, value = make_inputs(device, 1, 4, [20])
    assert attend((query[:0], kv, table, prefixes, key[:0], value[:0])).shape == (0, 4, 4, 32)


def test_what_is_not_visible_is_not_used(implementation, device):
    """NaN in the cache and wild table entries wherever no token of the row may look."""
    _, kv, table, *_ = inputs = make_inputs(device, 3, 4, [70, 20])
    mode = dict(sinks=16, window=24)
    want = check(inputs, **mode)
    blocks = kv.cache.view(-1, 2, 16, 2, 32)
    blocks[table[0, 1:3].long()] = torch.nan  # between sinks and window
    blocks[table[0, 4].long(), :, 6:] = torch.nan  # past the end
    blocks[table[1, 1].long(), :, 4:] = torch.nan
    table[0, 5:] = 2**30
    table[1, 2:] = -1
    assert_close("out", want, attend(inputs, **mode), 0.0)


def test_nan_of_a_visible_key_is_not_hidden(implementation, device):
    _, kv, table, _, key, _ = inputs = make_inputs(device, 2, 4, [100], 2, 1)
    key[1, 2] = torch.nan
    got = attend(inputs)
    assert got[1, 2:].isnan().all()
    assert got[0].isfinite().all()
    kv.cache.view(-1, 2, 16, 1, 32)[table[0, 3].long()] = torch.nan
    assert attend(inputs).isnan().all()


def test_scores_far_apart(implementation, device):
    """No overflow; and two parts that differ in weight are one softmax, nothing lost or doubled."""
    query, kv, table, prefixes, key, value = make_inputs(device, 2, 4, [90, 3])
    for soft_cap in (0.0, 30.0):
        check((query * 1e4, kv, table, prefixes, key, value), scale=1.0, soft_cap=soft_cap)
    for factor in (0.0, 1e-3, 30.0):
        check((query, kv, table, prefixes, key * factor, value))


def test_branches_and_tails_are_separate_and_causal(implementation, device):
    *_, key, value = inputs = make_inputs(device, 3, 6, [20, 9])
    before = attend(inputs)
    key[1, 8] += 1.0  # token 2 of row 1 in branch 1
    value[1, 8] += 1.0
    changed = (attend(inputs) != before).any(-1).any(-1)
    assert changed[1, 8:].all()
    assert changed.sum() == 4


@pytest.mark.parametrize("layout", ["hnd", "halves", "layers-interleaved"])
def test_cache_layouts(implementation, device, layout):
    query, _, table, *rest = make_inputs(device, 2, 3, [60, 37])
    cache = {
        "hnd": torch.randn(12, 2, 2, 16, 32).transpose(2, 3),
        "halves": torch.randn(2, 12, 16, 2, 32).transpose(0, 1),
        "layers-interleaved": torch.randn(12, 3, 2, 16, 2, 32)[:, 1],
    }[layout].to(device)
    check((query, PagedKV.of_views(cache[:, 0], cache[:, 1]), table, *rest), sinks=16, window=30)


@pytest.mark.parametrize("cache", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "e4m3"])
def test_tiled_cache_without_strides(implementation, device, cache):
    """Only the tables say where things lie, as in the CPU backend's packed tiles."""
    query, kv, *rest = make_inputs(device, 2, 3, [60, 37], 4, 2, 20, cache=cache)

    def shuffled(start: int) -> Addresses:
        token = torch.randperm(16, device=device).int() * 40 + start
        head = torch.tensor([20, 0], device=device).int()
        return Addresses(token, head, torch.randperm(20, device=device).int(), None)

    kv = dataclasses.replace(kv, key=shuffled(640), value=shuffled(0))
    check((query, kv, *rest), sinks=16, window=30, sliding_window=50)


def test_strides_of_the_arguments(implementation, device):
    """Contiguous; some tokens of more; far apart within a head. Tables are views of buffers."""
    query, kv, table, prefixes, key, value = make_inputs(device, 3, 4, [40, 21])
    table = torch.stack([table, table - 1], 2)[:, :, 0]
    prefixes = torch.stack([prefixes, prefixes + 1], 1)[:, 0]
    tensors = [tensor.contiguous() for tensor in (query, key, value)]
    longer = [torch.cat([tensor, tensor + 1], 1)[:, :8] for tensor in tensors]
    every_other = [torch.stack([tensor, -tensor], 4)[..., 0] for tensor in tensors]
    for query, key, value in (tensors, longer, every_other):
        check((query, kv, table, prefixes, key, value))


def test_arguments_are_left_alone_and_results_are_new(implementation, device):
    inputs = make_inputs(device, 2, 3, [50, 7])
    tensors = [inputs[1].cache, *(tensor for tensor in inputs if isinstance(tensor, torch.Tensor))]
    before = [tensor.clone() for tensor in tensors]
    first = check(inputs)
    kept = first.clone()
    attend((inputs[0] * 2, *inputs[1:]))
    assert torch.equal(first, kept)
    assert all(map(torch.equal, before, tensors))


def untouched(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory whose pages exist only once they are used."""
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except RuntimeError:
        pytest.skip(f"{elements * dtype.itemsize >> 20} MiB of address space are not to be had")


def test_cache_offsets_beyond_int32(implementation, device):
    """Block times block stride passes 2^31 elements."""
    query, _, _, prefixes, *tail = make_inputs(device, 2, 3, [45], 2, 1)
    cache = untouched(40 * 2**26, torch.float8_e5m2, device)
    blocks = cache.as_strided((40, 2, 16, 1, 32), (2**26, 512, 32, 32, 1))
    blocks[33:39] = torch.randn(6, 2, 16, 1, 32).to(device, cache.dtype)
    kv = PagedKV.of_views(blocks[:, 0], blocks[:, 1])
    check((query, kv, torch.tensor([[38, 33, 36]], device=device).int(), prefixes, *tail))


def test_token_offsets_beyond_int32(implementation, device):
    """Tokens so far apart that token times stride passes 2^31 elements."""
    inputs = [*make_inputs(device, 3, 2, [20], 1, 1, 16, dtype=BF16)]
    memory = untouched(5 * 2**29 + 64, BF16, device)
    for slot, place in enumerate((0, 4, 5)):
        far = memory[16 * slot :].as_strided((3, 2, 1, 16), (2**30, 2**29, 16, 1))
        inputs[place] = far.copy_(inputs[place])
    check(inputs)


@pytest.mark.gpu
def test_no_sync_and_no_dependence_on_values(implementation, device):
    """What a captured graph replays must follow new lengths and tables in the same buffers."""
    _, _, table, prefixes, *_ = inputs = make_inputs(device, 4, 5, [300, 17, 90], 4, 2, 64)
    mode = dict(sinks=16, window=64)
    attend(inputs, max_prefix=320, **mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(inputs, max_prefix=320, **mode)
    prefixes.copy_(torch.tensor([5, 280, 0], device=device))
    table.copy_(table.flip(0))
    graph.replay()
    assert_close("out", naive(inputs, 0.2, **mode), got, TOLERANCE[FP32])
