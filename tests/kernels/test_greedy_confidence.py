# SPDX-License-Identifier: Apache-2.0
"""`greedy_confidence` and its shards against softmax in float64 and Python's own maximum."""

import pytest
import torch

import knapspec_vllm.kernels.greedy_confidence as kernel
from knapspec_vllm import ops
from knapspec_vllm.kernels.reference import greedy_confidence as eager
from tests.helpers_kernels import assert_close
from tests.helpers_no_sync import no_host_sync

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("implementation")]

# Sums of up to 10^5 float32 terms in different orders, and exp to two units in the last place.
RELATIVE = 1e-5
LOWEST = torch.finfo(torch.float32).min

SIZES = [
    pytest.param(1, 1, id="one-token-vocabulary"),
    pytest.param(5, 123, id="B5-V123-weird"),
    pytest.param(2, 2048, id="B2-V2048-exactly-one-part"),
    pytest.param(2, 2049, id="B2-V2049-ragged-part-of-one"),
    pytest.param(3, 49152, id="B3-V49152-split"),
]


@pytest.fixture
def few_programs(monkeypatch):
    """Parts of several steps each, as thousands of rows would have, with few rows."""
    monkeypatch.setattr(kernel, "_PROGRAMS", 6)


def randn(rows, vocabulary, device, dtype=torch.float32):
    return (torch.randn(rows, vocabulary) * 5).to(device, dtype)


def check(logits, token_ids, probability):
    """Against definitions that share nothing with the op: list.index and float64."""
    assert token_ids.dtype is torch.int64
    assert probability.dtype is torch.float32
    assert token_ids.shape == probability.shape == (len(logits),)
    values = logits.double().cpu()
    assert token_ids.tolist() == [row.index(max(row)) for row in values.tolist()]
    want = torch.softmax(values, -1).amax(-1)
    assert_close("probability", want, probability, 0.0, RELATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, vocabulary", SIZES)
def test_matches_softmax(rows, vocabulary, dtype, device):
    # In bf16 a large vocabulary has equal maxima, so this also tests that the first one wins.
    logits = randn(rows, vocabulary, device, dtype)
    check(logits, *ops.greedy_confidence(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_alone(dtype, device):
    logits = randn(3, 49152, device, dtype)
    token_ids, probability = ops.greedy_confidence(logits, confident=False)
    values = logits.double().cpu().tolist()
    assert token_ids.tolist() == [row.index(max(row)) for row in values]
    assert probability.dtype is torch.float32
    assert (probability > 0).all()
    assert (probability <= 1).all()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("rows", [1, 3, 7], ids=["6-parts", "2-parts", "1-part"])
def test_parts_of_several_steps(rows, device):
    logits = randn(rows, 30001, device, torch.bfloat16)
    check(logits, *ops.greedy_confidence(logits))


def test_no_rows(device):
    token_ids, probability = ops.greedy_confidence(randn(0, 7, device))
    assert token_ids.shape == probability.shape == (0,)
    token_ids, maximum, total = ops.greedy_partials(randn(0, 7, device), first_token=0, valid=7)
    assert token_ids.shape == maximum.shape == total.shape == (0,)
    token_ids, probability = ops.merge_greedy(
        *(t.expand(3, 0) for t in (token_ids, maximum, total))
    )
    assert token_ids.shape == probability.shape == (0,)


@pytest.mark.parametrize("fixture", [None, "few_programs"])
@pytest.mark.parametrize("places", [(3, 9), (9, 5000), (2047, 2048), (100, 100 + 2048)], ids=str)
def test_first_of_equal_logits_wins(places, fixture, device, request):
    """Within a step, between steps of a part (the last pair with few programs), between parts."""
    if fixture:
        request.getfixturevalue(fixture)
    logits = torch.zeros(2, 9000, device=device)
    logits[:, list(places)] = 1.0
    token_ids, _ = ops.greedy_confidence(logits)
    assert token_ids.tolist() == [places[0]] * 2


@pytest.mark.usefixtures("few_programs")
def test_maximum_that_arrives_last_or_first(device):
    """The running sum must be rescaled when the maximum rises, and only then."""
    rising = torch.linspace(-40, 40, 20000, device=device)
    logits = torch.stack([rising, rising.flip(0)])
    check(logits, *ops.greedy_confidence(logits))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_saturated_rows(device):
    """Differences that overflow float32 or underflow exp."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, -3e38, 3e38]], device=device)
    token_ids, probability = ops.greedy_confidence(logits)
    assert token_ids.tolist() == [0, 2]
    assert probability.tolist() == [1.0, 1.0]


def test_masked_tokens(device):
    logits = torch.full((2, 4096), -torch.inf, device=device)
    logits[0, 1:3] = 0.0
    logits[1] = LOWEST  # the other common mask: an ordinary number, the same for all here
    token_ids, probability = ops.greedy_confidence(logits)
    assert token_ids.tolist() == [1, 0]
    assert probability.tolist() == [0.5, 1 / 4096]


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_row_without_any_token(device):
    """It must not become NaN: a valid id that nobody has confidence in."""
    logits = torch.full((2, 5000), -torch.inf, device=device)
    logits[1, 4999] = 3.0
    token_ids, probability = ops.greedy_confidence(logits)
    assert token_ids.tolist() == [0, 4999]
    assert probability.tolist() == [0.0, 1.0]


def test_nan_stays_within_its_row(device):
    logits = randn(3, 5000, device)
    logits[1] = torch.nan
    token_ids, probability = ops.greedy_confidence(logits)
    assert 0 <= int(token_ids[1]) < 5000  # it will index an embedding
    assert probability.isnan().tolist() == [False, True, False]


def test_strided_logits(device):
    """A padded vocabulary cut to size, every second row, and columns that are not dense."""
    padded = randn(6, 3200, device)
    padded[:, 3000:] = 1e9
    for logits in (padded[::2, :3000], padded[:, 1:2999:2], padded[:, :3000].T.contiguous().T):
        check(logits, *ops.greedy_confidence(logits))


def test_rows_past_2_to_the_31(device):
    """A row's offset does not fit 32 bits though the stride does; few pages are ever touched."""
    stride = 1 << 28
    base = torch.empty(8 * stride + 3000, dtype=torch.float16, device=device)
    logits = base.as_strided((9, 3000), (stride, 1))
    logits.copy_(randn(9, 3000, device, torch.float16))
    check(logits, *ops.greedy_confidence(logits))


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("rows, vocabulary", [(1, 9), (5, 12345)], ids=["B1-V9", "B5-V12345"])
def test_shards_merge_to_the_whole(shards, rows, vocabulary, device):
    """As vLLM shards: equal widths, the last shards padded or, for 9 tokens on 8, empty."""
    logits = randn(rows, vocabulary, device, torch.bfloat16)
    width = -(-vocabulary // shards)
    parts = []
    for shard in range(shards):
        first = shard * width
        valid = max(0, min(width, vocabulary - first))
        local = torch.full((rows, width), 1e4, device=device, dtype=torch.bfloat16)
        local[:, :valid] = logits[:, first : first + valid]
        parts.append(ops.greedy_partials(local, first_token=first, valid=valid))
    merged = ops.merge_greedy(*(torch.stack(part) for part in zip(*parts, strict=True)))
    check(logits, *merged)


@pytest.mark.parametrize("valid", [0, 1, 77, 5000])
def test_partials(valid, device):
    """Maximum and sum of one shard, which other ranks rely on; columns past `valid` are padding."""
    logits = randn(3, 5000, device)
    logits[:, valid:] = torch.nan
    token_ids, maximum, total = ops.greedy_partials(logits, first_token=70000, valid=valid)
    assert (token_ids.dtype, maximum.dtype, total.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )
    if not valid:
        assert token_ids.tolist() == [70000] * 3
        assert maximum.tolist() == [-torch.inf] * 3
        assert total.tolist() == [0.0] * 3
        return
    values = logits[:, :valid].double()
    assert token_ids.tolist() == (values.argmax(-1) + 70000).tolist()
    assert_close("maximum", values.amax(-1), maximum, 0.0)
    want = torch.exp(values - values.amax(-1, keepdim=True)).sum(-1)
    assert_close("total", want, total, 0.0, RELATIVE)


def test_merge_of_strided_and_equal_parts(device):
    """Gathered partials are views of a larger buffer; of equal maxima the first shard's wins."""
    ids = torch.tensor([[5, 100], [905, 1000], [1805, 1900]], device=device).T.contiguous().T
    maximum = torch.tensor([[1.0, -torch.inf], [2.0, 0.5], [2.0, -torch.inf]], device=device)
    total = torch.tensor([[3.0, 0.0], [1.5, 4.0], [2.5, 0.0]], device=device)
    wide = torch.zeros(2, 3, 9, device=device)
    wide[0, :, 4:6], wide[1, :, 4:6] = maximum, total
    token_ids, probability = ops.merge_greedy(ids, wide[0, :, 4:6], wide[1, :, 4:6])
    assert token_ids.tolist() == [905, 1000]
    want = torch.tensor([1 / (3 * 2.718281828459045**-1 + 1.5 + 2.5), 1 / 4])
    assert_close("probability", want, probability, 0.0, RELATIVE)


def test_merge_of_nan(device):
    """Three parts, so that a lane of the kernel has none: the id must be one of the parts'."""
    ids = torch.tensor([[7], [8], [9]], device=device)
    nan = torch.full((3, 1), torch.nan, device=device)
    token_ids, probability = ops.merge_greedy(ids, nan, nan)
    assert int(token_ids) in (7, 8, 9)
    assert probability.isnan().all()


def test_the_twin_never_waits_for_the_device(device):
    logits = randn(2, 300, device)
    with no_host_sync():
        eager.greedy_confidence(logits)
        parts = eager.greedy_partials(logits, first_token=300, valid=299)
        eager.merge_greedy(*(part[None] for part in parts))


@pytest.mark.gpu
def test_can_be_captured(device):
    logits = randn(3, 50257, device)
    ops.greedy_confidence(logits)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.greedy_confidence(logits)
    logits.copy_(randn(3, 50257, device))
    graph.replay()
    check(logits, *found)
