# SPDX-License-Identifier: Apache-2.0
"""`dp_relax` against loops over candidates in Python, and `gather_branches` against indexing the
stacked streams. Which candidates have to win is in test_dp_select.py."""

import pytest
import torch

from knapspec_vllm import ops
from tests.helpers_kernels import assert_close
from tests.helpers_relax import (
    ABSOLUTE,
    FULL,
    MODES,
    RELATIVE,
    SKIP,
    WINDOW,
    check,
    naive_errors,
    near,
    random_case,
    tensors,
)

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("implementation")]


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize(
    "number, tokens, dim, dtype",
    [
        pytest.param(6, 5, 123, torch.float32, id="weird-N6-R5-d123-fp32"),
        pytest.param(6, 9, 576, torch.bfloat16, id="ragged-tokens-N6-R9-d576-bf16"),
        pytest.param(3, 2, 5000, torch.float16, id="wide-N3-R2-d5000-fp16"),
        pytest.param(2, 18, 4096, torch.bfloat16, id="many-tiles-N2-R18-d4096-bf16"),
        pytest.param(2, 1, 2, torch.float32, id="smallest-N2-R1-d2-fp32"),
    ],
)
def test_matches_loops(number, tokens, dim, dtype, modes, device):
    case = random_case(number, tokens, dim, modes, device, dtype)
    # As the branches of the first items grow, stay as many, and become fewer.
    for rows_out in (len(modes) * number, number, 1 + number // 2):
        check(modes, *case, rows_out=rows_out)


def test_errors_close_to_zero_are_exact(device):
    """1 - cosine in float32 has no digit left below 1e-7."""
    target = torch.randn(4, 200)
    streams = [near(target, 4, spread, torch.float32).to(device) for spread in (1e-4, 1e-5)]
    streams[0][0] = target
    ones = torch.ones(4, dtype=torch.bool, device=device)
    saved, savings = torch.arange(4) / 8, torch.tensor([0.0, 0.0, 0.02])
    got = ops.dp_relax(
        streams[0], None, streams[1], saved.to(device), ones, savings.to(device),
        rows_out=4, prune_cosine=0.9, max_saving=1.0, exchange_rate=0.1,
    )  # fmt: skip
    error = torch.tensor(naive_errors(target, streams), dtype=torch.float64)
    picked = error[got.rows[got.alive].long().cpu()]
    assert len(picked) > 1
    assert 0 < float(picked[1:].max()) < 1e-8
    # States carry 2^-24 relative, 1e-3 of a distance of 1e-4; it averages out over 800 elements.
    assert_close("error", picked, got.error[got.alive], ABSOLUTE, 1e-3)


def test_item_that_always_runs_keeps_rows_in_place(device):
    streams, saved, alive, savings = random_case(7, 5, 40, (FULL,), device, spread=1.5)
    alive[2] = False
    got = ops.dp_relax(
        streams[0], None, None, saved, alive, savings,
        rows_out=7, prune_cosine=0.6, max_saving=0.0, exchange_rate=0.1,
    )  # fmt: skip
    error = naive_errors(streams[0][0], streams)
    want = [n == 0 or (bool(alive[n]) and error[n] <= 0.4) for n in range(7)]
    assert 2 < sum(want) < 6  # some pruned, whether the cap allows their saving or not
    assert got.alive.tolist() == want
    assert got.rows.tolist() == got.parents.tolist() == list(range(7))
    assert got.modes.tolist() == [FULL] * 7
    assert torch.equal(got.saved, saved)
    want = torch.tensor(error, dtype=torch.float64)[got.alive.cpu()]
    assert_close("error", want, got.error[got.alive], ABSOLUTE, RELATIVE)
    got = ops.dp_relax(
        streams[0], None, None, saved, alive, savings,
        rows_out=7, prune_cosine=1.1, max_saving=0.0, exchange_rate=0.1,
    )  # fmt: skip
    assert got.alive.tolist() == [True] + [False] * 6


def test_bad_states_do_not_spread(device):
    """NaN in a dead branch, or in a live one, which is pruned for it."""
    streams, saved, alive, savings = random_case(6, 3, 16, (0, 1, 2), device, spread=0.5)
    alive[:] = torch.tensor([True, True, False, True, True, True])
    for stream in streams:
        stream[2] = float("nan")
    streams[1][4, 1, 3] = float("nan")
    got = check((0, 1, 2), streams, saved, alive, savings)
    assert 2 not in got.parents[got.alive].tolist()
    assert int(got.alive.sum()) > 2


def test_only_the_target(device):
    full = torch.randn(1, 3, 8, device=device)
    values = tensors(device, [0.125], [True], [0.0, 0.0, 0.25])
    got = check((FULL, SKIP), [full, full * 2], *values)
    assert got.saved.tolist() == [0.125]


def test_expanded_and_strided_streams(device):
    """Before the first item all branches are one state; streams may be slices of larger tensors."""
    start = torch.randn(3, 24, device=device)
    both = torch.cat([near(start.cpu(), 4, 0.5) for _ in range(2)], dim=1).to(device)
    wide = torch.full((4, 3, 30), float("nan"), device=device)
    wide[..., 4:28] = near(start.cpu(), 4, 0.5).to(device)
    streams = [both[:, 3:], wide[..., 4:28], start.expand(4, -1, -1)]
    savings = [0.0, 0.02, 0.05]
    values = tensors(device, [0.0, 0.1, 0.2, 0.3], [True, False, False, True], savings)
    check((FULL, WINDOW, SKIP), streams, *values)
    values[2][SKIP] = -1.0
    got = check((FULL, WINDOW, SKIP), streams, *values)
    assert WINDOW in got.modes.tolist()
    rows = torch.tensor([11, 5, 2, 7], dtype=torch.int32, device=device)
    check_gather(streams, rows)
    check_gather([streams[2], None, streams[0]], rows % 8)


def test_launches_of_different_sizes_in_turn(device):
    """The counter of arrived programs has to be back at 0, and results do not depend on order."""
    first = random_case(5, 9, 600, (FULL, SKIP), device)
    second = random_case(3, 1, 8, (FULL, SKIP), device)
    results = [check((FULL, SKIP), *case) for case in (first, second, first)]
    for once, again in zip(results[0], results[2], strict=True):
        assert torch.equal(once[results[0].alive], again[results[0].alive])


def check_gather(streams, rows):
    given = [stream for stream in streams if stream is not None]
    want = torch.stack(given).flatten(0, 1)[rows.long()]
    got = ops.gather_branches(*streams, rows)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    storages = {stream.untyped_storage().data_ptr() for stream in given}
    assert got.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "number, tokens, dim",
    [
        pytest.param(5, 3, 123, id="ragged-N5-R3-d123"),
        pytest.param(3, 9, 576, id="blocks-N3-R9-d576"),
        pytest.param(1, 1, 1, id="smallest"),
    ],
)
def test_gather(number, tokens, dim, dtype, device):
    full, window, skip = torch.randn(3, number, tokens, dim).to(dtype).to(device).unbind()
    for streams in (
        [full, window, skip],
        [full, None, skip],
        [full, window, None],
        [full] + [None] * 2,
    ):
        count = number * sum(stream is not None for stream in streams)
        rows = torch.randint(0, count, (number,), dtype=torch.int32)
        rows[-1] = count - 1
        check_gather(streams, rows.to(device))
        check_gather(streams, torch.full_like(rows, count // 2).to(device))  # all the same
        check_gather(streams, torch.cat([rows, rows[:1]]).to(device))  # more than there were
        check_gather(streams, rows[-1:].to(device))


def test_offsets_beyond_32_bits(device):
    """Branches 2^30 elements apart in one tensor of which only the states are ever touched."""
    apart = 2**30 + 8
    try:
        storage = torch.empty(2 * apart + 64, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("not enough memory")
    full = storage.as_strided((3, 2, 16), (apart, 16, 1))
    full.copy_(near(torch.randn(2, 16), 3, 0.5, torch.bfloat16))
    skip = torch.as_strided(storage, (3, 2, 16), (apart, 16, 1), 32)
    skip.copy_(near(full[0].float().cpu(), 3, 0.5, torch.bfloat16))
    values = tensors(device, [0.0, 0.1, 0.2], [True] * 3, [0.0, 0.0, 0.3])
    got = check((FULL, SKIP), [full, skip], *values)
    assert int(got.alive.sum()) == 3
    rows = torch.tensor([5, 2, 1], dtype=torch.int32, device=device)
    got = ops.gather_branches(full, None, skip, rows)
    assert torch.equal(got, torch.stack([skip[2], full[2], full[1]]))


@pytest.mark.parametrize(
    "modes, rows_out", [((FULL, SKIP), 0), ((FULL, SKIP), 7), ((FULL,), 2), ((FULL,), 4)]
)
def test_rows_that_nothing_can_fill_are_refused(modes, rows_out, device):
    streams, saved, alive, savings = random_case(3, 2, 8, modes, device)
    given = dict(zip(modes, streams, strict=True))
    with pytest.raises(ValueError, match=f"rows_out is {rows_out} for 3 branches"):
        ops.dp_relax(
            given[FULL], None, given.get(SKIP), saved, alive, savings,
            rows_out=rows_out, prune_cosine=0.5, max_saving=1.0, exchange_rate=0.1,
        )  # fmt: skip


def test_streams_that_are_not_dense_are_refused(implementation, device):
    full = torch.randn(2, 4, 6, device=device).transpose(1, 2)
    rows = torch.zeros(2, dtype=torch.int32, device=device)
    if implementation == "eager":  # torch takes any strides
        assert torch.equal(ops.gather_branches(full, None, None, rows), full[[0, 0]])
        return
    with pytest.raises(ValueError, match="dense"):
        ops.gather_branches(full, None, None, rows)


@pytest.mark.gpu
def test_in_a_cuda_graph(device):
    modes = (0, 1, 2)
    cases = [random_case(9, 8, 96, modes, device) for _ in range(2)]
    streams, *values = [[part.clone() for part in cases[0][0]], *(v.clone() for v in cases[0][1:])]
    settings = {"rows_out": 9, "prune_cosine": 0.5, "max_saving": 0.75, "exchange_rate": 0.137}

    def step():
        relaxed = ops.dp_relax(*streams, *values, **settings)
        return relaxed, ops.gather_branches(*streams, relaxed.rows)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        relaxed, gathered = step()
    for new_streams, *new_values in reversed(cases):
        for old, new in zip([*streams, *values], [*new_streams, *new_values], strict=True):
            old.copy_(new)
        graph.replay()
        want = check(modes, new_streams, *new_values)
        for was, wanted in zip(relaxed, want, strict=True):
            assert torch.equal(was[want.alive], wanted[want.alive])
        stacked = torch.stack(new_streams).flatten(0, 1)
        assert torch.equal(gathered[want.alive], stacked[want.rows.long()][want.alive])
