# SPDX-License-Identifier: Apache-2.0
"""`paged_decode_attention` against softmax attention over one row's keys, picked by position."""

import dataclasses
import math

import pytest
import torch

from knapspec_vllm import envs, ops
from knapspec_vllm.kernels.paged_kv import Addresses, PagedKV
from tests.helpers_kernels import assert_close

pytestmark = pytest.mark.kernels

# float32: only the order of sums differs. 16 bits: the weights and the result are rounded to the
# dtype (2^-9 or 2^-12 relative) and results stay below 4; Triton on a GPU rounds both, eager one.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# lengths, Hq, Hkv, D, block size
SHAPES = [
    pytest.param([1], 1, 1, 32, 16, id="one-key"),
    pytest.param([300, 17, 0, 256], 4, 2, 64, 16, id="ragged-tails-and-padding-row"),
    pytest.param([123, 129], 9, 3, 17, 5, id="weird-group3-dim17-block5"),
    pytest.param([200], 6, 1, 100, 32, id="mqa-dim100"),
    pytest.param([65, 33], 70, 1, 130, 16, id="two-programs-for-70-heads"),
    pytest.param([300], 2, 2, 256, 16, id="mha-dim256"),
    pytest.param([120, 97, 1], 2, 2, 256, 16, id="no-splits-many-tiles"),
]
# sinks and window in blocks (so that every block size works), sliding window and cap as they are
MODES = [
    pytest.param(1, 0.0, 0, 0.0, id="full-sinks-mean-nothing"),
    pytest.param(1, 2.5, 0, 0.0, id="window-and-sinks"),
    pytest.param(0, 0.4, 0, 0.0, id="window-below-a-block"),
    pytest.param(1, 0.0, 29, 0.0, id="sliding-sinks-mean-nothing"),
    pytest.param(0, 0.0, 0, 3.0, id="cap"),
    pytest.param(2, 3.0, 37, 2.0, id="all-at-once"),
    pytest.param(2, 1.0, 150, 0.0, id="sliding-window-cuts-the-sinks"),
]


def make_cache(blocks, block_size, heads, dim, dtype, device) -> PagedKV:
    # [blocks, 2, block_size, Hkv, D], as vLLM's GPU backends have it
    cache = torch.randn(blocks, 2, block_size, heads, dim).to(dtype).to(device)
    return PagedKV.of_views(cache[:, 0], cache[:, 1])


def make_inputs(lengths, hq, hkv, dim, block_size, dtype, device, cache_dtype=None):
    """Query, cache, table and lengths; blocks of a row are scattered, rows share none."""
    width = max(1, -(-max(lengths) // block_size)) + 2
    kv = make_cache(len(lengths) * width, block_size, hkv, dim, cache_dtype or dtype, device)
    table = torch.randperm(len(lengths) * width).view(len(lengths), width).to(torch.int32)
    query = torch.randn(len(lengths), hq, dim).to(dtype)
    return query.to(device), kv, table.to(device), torch.tensor(lengths, device=device)


def read(kv: PagedKV, where: Addresses, block: int, slot: int) -> torch.Tensor:
    """[Hkv, D] float32, one element after the other by the formula in paged_kv.py."""
    inside = where.head.long()[:, None] + where.dim.long() + where.token[slot].long()
    raw = kv.cache.view(torch.uint8) if kv.cache.itemsize == 1 else kv.cache
    return raw[block * kv.block_stride + inside].view(kv.cache.dtype).float()


def naive(query, kv, table, lengths, scale, *, sinks=0, window=0, sliding_window=0, soft_cap=0.0):
    """Row by row: the visible positions as a Python list, then plain attention in float32."""
    result = torch.zeros_like(query, dtype=torch.float32)
    for row, length in enumerate(lengths.tolist()):
        first = 0
        if window:
            first = max(sinks, math.floor((length - window) / kv.block_size) * kv.block_size)
        seen = [
            p
            for p in range(length)
            if (not window or p < sinks or p >= first)
            and (not sliding_window or p > length - 1 - sliding_window)
        ]
        if not seen:
            continue
        places = [(int(table[row, p // kv.block_size]), p % kv.block_size) for p in seen]
        group = query.shape[1] // kv.num_heads
        # [Hq, keys, D]
        key = torch.stack([read(kv, kv.key, *place) for place in places], 1) * kv.key_scale
        value = torch.stack([read(kv, kv.value, *place) for place in places], 1) * kv.value_scale
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        scores = (key @ query[row].float()[:, :, None])[..., 0] * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        result[row] = (scores.softmax(-1)[:, None] @ value)[:, 0]
    return result.to(query.dtype)


def check(query, kv, table, lengths, *, scale=None, tolerance=None, max_length=None, **mode):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bound = int(lengths.max()) if max_length is None else max_length
    got = ops.paged_decode_attention(query, kv, table, lengths, scale, max_length=bound, **mode)
    assert got.dtype is query.dtype
    want = naive(query, kv, table, lengths, scale, **mode)
    assert_close("out", want, got, tolerance or TOLERANCE[query.dtype])
    return got


@pytest.mark.parametrize("sinks, window, sliding_window, soft_cap", MODES)
@pytest.mark.parametrize("lengths, hq, hkv, dim, block_size", SHAPES)
def test_matches_naive_attention(
    implementation,
    device,
    lengths,
    hq,
    hkv,
    dim,
    block_size,
    sinks,
    window,
    sliding_window,
    soft_cap,
):
    inputs = make_inputs(lengths, hq, hkv, dim, block_size, torch.float32, device)
    check(
        *inputs,
        sinks=sinks * block_size,
        window=int(window * block_size),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits(implementation, device, dtype):
    check(*make_inputs([200, 61], 8, 2, 64, 16, dtype, device), sinks=16, window=100, soft_cap=5.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_fp8_cache_with_scales(implementation, device, cache, dtype):
    query, kv, table, lengths = make_inputs([150, 40], 4, 2, 32, 16, dtype, device, cache)
    kv = dataclasses.replace(kv, key_scale=0.5, value_scale=1.25)
    check(query, kv, table, lengths, tolerance=1.25 * TOLERANCE[dtype])


def test_eager_gathers_only_what_is_visible(monkeypatch):
    """As many blocks as window, sinks and sliding window can touch, not all that the table has."""
    query, kv, table, lengths = make_inputs([500, 90], 2, 1, 16, 16, torch.float32, "cpu")
    gathered = []
    gather = PagedKV.gather
    monkeypatch.setenv(envs.KERNELS, "eager")
    monkeypatch.setattr(
        PagedKV, "gather", lambda *args: gathered.append(args[1].shape[1]) or gather(*args)
    )
    check(query, kv, table, lengths)
    check(query, kv, table, lengths, sinks=32, window=34)
    check(query, kv, table, lengths, sliding_window=17)
    check(query, kv, table, lengths, sinks=16, window=100, sliding_window=33)
    assert gathered == [32, 2 + 4, 2, 1 + 3]


@pytest.mark.parametrize("bits", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_first_visible_block_moves_at_every_length(implementation, device, bits):
    """Off-by-one at a block's edge: lengths around the point where the window leaves the sinks."""
    lengths = [*range(1, 9), *range(22, 31)]
    query, kv, table, lengths = make_inputs(lengths, 2, 1, 16, 4, torch.float32, device)
    check(query, kv, table, lengths.to(bits), sinks=8, window=11)
    check(query, kv, table, lengths.to(bits), sinks=8, window=11, sliding_window=14)


def test_length_bound_far_above_the_lengths(implementation, device):
    """Under a CUDA graph the bound is the longest context: most splits then have no keys."""
    query, kv, table, lengths = make_inputs([40, 0, 1], 2, 1, 32, 16, torch.float32, device)
    table = torch.nn.functional.pad(table, (0, 250))
    check(query, kv, table, lengths, max_length=4000)


def test_padding_rows_only(implementation, device):
    query, kv, table, lengths = make_inputs([0, 0], 4, 2, 32, 16, torch.float32, device)
    got = check(query, kv, table, lengths, max_length=64, sinks=16, window=16)
    assert not got.any()


@pytest.mark.parametrize("max_length", [0, 64])
def test_empty_batch(implementation, device, max_length):
    query, kv, table, lengths = make_inputs([20], 4, 2, 32, 16, torch.float32, device)
    got = ops.paged_decode_attention(
        query[:0], kv, table[:0], lengths[:0], 1.0, max_length=max_length
    )
    assert got.shape == (0, 4, 32)


def test_what_is_not_visible_is_not_used(implementation, device):
    """NaN in the cache and wild table entries wherever the row may not look."""
    query, kv, table, lengths = make_inputs([70, 20], 4, 2, 32, 16, torch.float32, device)
    mode = dict(sinks=16, window=20)
    want = check(query, kv, table, lengths, **mode)
    blocks = kv.cache.view(-1, 2, 16, 2, 32)
    blocks[table[0, 1:3].long()] = math.nan  # between sinks and window
    blocks[table[0, 4].long(), :, 6:] = math.nan  # past the end
    blocks[table[1, 1].long(), :, 4:] = math.nan
    table[0, 5:] = 2**30
    table[1, 2:] = -1
    got = ops.paged_decode_attention(query, kv, table, lengths, 32**-0.5, max_length=70, **mode)
    assert_close("out", want, got, 0.0)


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's
@pytest.mark.parametrize("blocks", [slice(9, 10), slice(None)], ids=["one-block", "all"])
def test_nan_of_a_visible_key_is_not_hidden(implementation, device, blocks):
    """Not even by a split that saw nothing else, whose highest score is then no number."""
    query, kv, table, lengths = make_inputs([300], 2, 1, 32, 16, torch.float32, device)
    kv.cache.view(-1, 2, 16, 1, 32)[table[0, blocks].long()] = math.nan
    got = ops.paged_decode_attention(query, kv, table, lengths, 1.0, max_length=300)
    assert got.isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's; wanted
def test_large_scores_do_not_overflow(implementation, device):
    query, kv, table, lengths = make_inputs([200, 3], 4, 2, 32, 16, torch.float32, device)
    check(query * 1e4, kv, table, lengths, scale=1.0)
    check(query * 1e4, kv, table, lengths, scale=1.0, soft_cap=30.0)


@pytest.mark.parametrize("layout", ["hnd", "halves", "layers-interleaved", "tokens-adjacent"])
def test_cache_layouts(implementation, device, layout):
    query, _, table, lengths = make_inputs([100, 37], 4, 2, 32, 16, torch.float32, device)
    blocks = table.numel()
    if layout == "hnd":
        cache = torch.randn(blocks, 2, 2, 16, 32, device=device).transpose(2, 3)
    elif layout == "halves":
        cache = torch.randn(2, blocks, 16, 2, 32, device=device).transpose(0, 1)
    elif layout == "layers-interleaved":
        cache = torch.randn(blocks, 3, 2, 16, 2, 32, device=device)[:, 1]
    else:
        cache = torch.randn(blocks, 2, 2, 32, 16, device=device).permute(0, 1, 4, 2, 3)
    kv = PagedKV.of_views(cache[:, 0], cache[:, 1])
    check(query, kv, table, lengths, sinks=16, window=40)


@pytest.mark.parametrize("cache", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "e4m3"])
def test_tiled_cache_without_strides(implementation, device, cache):
    """Only the tables say where things lie, as in the CPU backend's packed tiles."""
    query, kv, table, lengths = make_inputs([100, 37], 4, 2, 20, 16, torch.float32, device, cache)

    def shuffled(start: int) -> Addresses:
        tables = torch.randperm(16) * 40 + start, torch.randperm(2) * 20, torch.randperm(20)
        return Addresses(*(table.int().to(device) for table in tables), strides=None)

    kv = dataclasses.replace(kv, key=shuffled(640), value=shuffled(0))
    check(query, kv, table, lengths, sinks=16, window=40, sliding_window=50)


def test_views_of_larger_tensors(implementation, device):
    """The query is a slice of the QKV projection, the table and lengths are views of buffers."""
    query, kv, table, lengths = make_inputs([100, 37, 5], 4, 2, 32, 16, torch.float32, device)
    qkv = torch.cat([query, torch.randn(3, 4, 32, device=device)], 1)
    columns = torch.stack([table, table - 1], 2)
    twice = torch.stack([lengths, lengths + 1], 1)
    check(qkv[:, :4], kv, columns[:, :, 0], twice[:, 0])
    every_other = torch.stack([query, -query], 3)[..., 0]
    assert every_other.stride(2) == 2
    check(every_other, kv, table, lengths)


def test_arguments_are_left_alone_and_results_are_new(implementation, device):
    query, kv, table, lengths = make_inputs([100, 37], 4, 2, 32, 16, torch.float32, device)
    before = [t.clone() for t in (query, kv.cache, table, lengths)]
    first = check(query, kv, table, lengths)
    check(query * 2, kv, table, lengths)
    assert torch.equal(first, check(query, kv, table, lengths))
    assert all(map(torch.equal, before, (query, kv.cache, table, lengths)))


def test_offsets_beyond_int32(implementation, device):
    """Block times block stride passes 2^31 elements; the pages between are never touched."""
    stride = 2**26
    try:
        cache = torch.empty(40 * stride, dtype=torch.float8_e5m2, device=device)
    except RuntimeError:
        pytest.skip("2.5 GiB of address space are not to be had")
    blocks = cache.as_strided((40, 2, 16, 1, 32), (stride, 512, 32, 32, 1))
    values = torch.randn(6, 2, 16, 1, 32).to(cache.dtype)
    blocks[33:39].view(torch.uint8).copy_(values.view(torch.uint8))
    kv = PagedKV.of_views(blocks[:, 0], blocks[:, 1])
    table = torch.tensor([[38, 33, 36]], dtype=torch.int32, device=device)
    query = torch.randn(1, 2, 32, device=device)
    check(query, kv, table, torch.tensor([45], device=device))


@pytest.mark.gpu
def test_replayed_graph_follows_new_values(implementation, device):
    """Nothing may depend on what lengths and tables held at capture, and nothing may wait."""
    query, kv, table, lengths = make_inputs([300, 17, 90], 4, 2, 64, 16, torch.float32, device)

    def run():
        return ops.paged_decode_attention(query, kv, table, lengths, 0.1, max_length=320)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    lengths.copy_(torch.tensor([5, 280, 0], device=device))
    table.copy_(table.flip(0))
    graph.replay()
    assert_close("out", naive(query, kv, table, lengths, 0.1), got, 2e-5)
