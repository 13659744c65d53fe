# SPDX-License-Identifier: Apache-2.0
"""`draft_start` and `draft_advance` against a round told row by row in plain Python."""

import dataclasses

import pytest
import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.kernels.draft_state import DraftState
from knapspec_vllm.kernels.reference import draft_advance as eager
from tests.helpers_no_sync import no_host_sync

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("implementation")]

TENSORS = [f.name for f in dataclasses.fields(DraftState) if "torch.Tensor" in str(f.type)]


def make(positions, limits, device, draft_length=4, blocks=12, **options):
    """A state of rows at these positions; everything draft_start should write is filled with 77."""
    rows = len(positions)
    table = torch.randperm(rows * blocks * 3)[: rows * blocks].reshape(rows, blocks)
    options = dict(block_size=4, max_model_len=1000, sink_blocks=1, window_tokens=8) | options
    state = DraftState.allocate(rows, draft_length, table.int().to(device), **options)
    for name in TENSORS:
        tensor = getattr(state, name)
        if tensor is not None and name not in ("block_table", "active"):
            tensor.fill_(77)
    state.active.fill_(True)
    state.positions.copy_(torch.tensor(positions))
    state.limits.copy_(torch.tensor(limits))
    state.tokens.copy_(torch.arange(rows) + 1000)
    return state


def contents(state):
    """The state as Python numbers."""
    return {
        name: tensor.tolist() for name in TENSORS if (tensor := getattr(state, name)) is not None
    }


class Naive:
    """The same round in lists and loops. Windows are found by dropping blocks one at a time."""

    def __init__(self, state):
        self.state = state
        self.want = contents(state)

    def start(self):
        want = self.want
        for row, position in enumerate(want["positions"]):
            want["drafts"][row] = [-1] * len(want["drafts"][row])
            want["counts"][row] = 0
            want["active"][row] = want["limits"][row] > 0 and self.possible(row, position)
            self.place(row, position)
            if not want["active"][row]:
                want["slots"][row] = -1

    def advance(self, token_ids, confidence, threshold):
        want = self.want
        for row in range(len(token_ids)):
            if not want["active"][row]:
                continue
            drafted = want["counts"][row]
            want["drafts"][row][drafted] = token_ids[row]
            want["counts"][row] = drafted + 1
            position = want["positions"][row] + 1
            if (
                drafted + 1 < min(want["limits"][row], len(want["drafts"][row]))
                and confidence[row] >= threshold
                and self.possible(row, position)
            ):
                want["tokens"][row] = token_ids[row]
                want["positions"][row] = position
                self.place(row, position)
            else:
                want["active"][row] = False
                want["slots"][row] = -1

    def possible(self, row, position):
        capacity = len(self.want["block_table"][row]) * self.state.block_size
        return 0 <= position < capacity and position + 1 <= self.state.max_model_len - 1

    def place(self, row, position):
        want, state, size = self.want, self.state, self.state.block_size
        table = want["block_table"][row]
        want["lengths"][row] = position + 1
        if 0 <= position < len(table) * size:
            want["slots"][row] = table[position // size] * size + position % size
        if state.window_table is None:
            return
        first = state.sink_blocks
        while position + 1 - (first + 1) * size >= state.window_tokens:
            first += 1
        kept = list(range(state.sink_blocks)) + list(range(first, len(table)))
        used = -(-(position + 1 - (first - state.sink_blocks) * size) // size)
        width = len(want["window_table"][row])
        assert used <= width
        columns = [*kept, *[len(table) - 1] * width][:width]
        want["window_table"][row] = [table[column] for column in columns]
        want["window_lengths"][row] = position + 1 - (first - state.sink_blocks) * size


def play(state, rounds=6, threshold=0.3):
    """Starts, then advances with random tokens until past the longest draft."""
    naive = Naive(state)
    ops.draft_start(state)
    naive.start()
    assert contents(state) == naive.want
    for _ in range(rounds):
        token_ids = torch.randint_like(state.tokens, 1 << 40)
        confidence = torch.rand(len(token_ids), device=token_ids.device)
        ops.draft_advance(state, token_ids, confidence, threshold=threshold)
        naive.advance(token_ids.tolist(), confidence.tolist(), threshold)
        assert contents(state) == naive.want
    return naive.want


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window_tokens", [0, 1, 7, 16])
@pytest.mark.parametrize("sink_blocks", [0, 2])
def test_rounds(block_size, window_tokens, sink_blocks, device):
    """Block edges, and windows that are shorter, as long and longer than the context."""
    positions = [0, 1, block_size - 1, block_size, 3 * block_size - 2, 5 * block_size + 1, 23, 37]
    state = make(
        positions,
        [4, 3, 4, 1, 9, 4, 2, 4],
        device,
        blocks=48,
        block_size=block_size,
        window_tokens=window_tokens,
        sink_blocks=sink_blocks,
    )
    assert (state.window_table is None) == (window_tokens == 0)
    play(state)


def test_window_agrees_with_the_planner(device):
    """What the cost model charges for WINDOW is what the state makes attention read."""
    geometry = WindowGeometry.of(5, 8, 4)
    state = make(list(range(40)), [2] * 40, device, sink_blocks=geometry.sink_blocks)
    ops.draft_start(state)
    want = [geometry.kept_tokens(position + 1) for position in range(40)]
    assert contents(state)["window_lengths"] == want


def test_stops_at_the_limit_and_at_the_room_for_drafts(device):
    state = make([3, 3, 3], [1, 3, 100], device, draft_length=5)
    want = play(state, threshold=0.0)
    assert want["counts"] == [1, 3, 5]
    assert want["active"] == [False] * 3


def test_stops_at_the_last_position_of_the_model(device):
    """max_model_len 20: a token at 19 may be drafted, by the forward at 18; none starts at 19."""
    state = make([15, 17, 18, 19, 25], [9] * 5, device, draft_length=8, max_model_len=20)
    assert play(state, threshold=0.0)["counts"] == [4, 2, 1, 0, 0]


def test_never_looks_past_the_block_table(device):
    """3 blocks of 4 end at position 11, whatever the limits say; the next row's table is near."""
    state = make([8, 11, 12, 400], [9] * 4, device, draft_length=8, blocks=3)
    want = play(state, threshold=0.0)
    assert want["counts"] == [4, 1, 0, 0]
    assert want["slots"] == [-1] * 4


def test_confidence(device):
    """A row goes on after a token at the threshold; an unlikely token, or NaN, is its last."""
    state = make([5, 5, 5, 5], [4] * 4, device)
    ops.draft_start(state)
    confidence = torch.tensor([0.5, 0.49, torch.nan, 1.0], device=device)
    ops.draft_advance(state, state.tokens * 2, confidence, threshold=0.5)
    assert state.active.tolist() == [True, False, False, True]
    assert state.counts.tolist() == [1] * 4
    assert state.drafts[:, 0].tolist() == [2000, 2002, 2004, 2006]
    assert state.tokens.tolist() == [2000, 1001, 1002, 2006]


def test_padding_rows(device):
    """Limit 0: not active and no slot; with position -1 attention sees nothing. They stay so."""
    state = make([-1, 7, 7, -1], [0, 2, 0, 3], device)
    want = play(state, threshold=0.0)
    assert want["counts"] == [0, 2, 0, 0]
    assert want["lengths"] == [0, 9, 8, 0]
    assert want["window_lengths"][0] == want["window_lengths"][3] == 0


def test_stopped_rows_ignore_what_is_drafted_for_them(device):
    state = make([5, 6], [1, 4], device)
    ops.draft_start(state)
    ones = torch.ones(2, device=device)
    ops.draft_advance(state, torch.tensor([10, 20], device=device), ones, threshold=0.0)
    before = contents(state)
    ops.draft_advance(state, torch.tensor([99, 21], device=device), ones, threshold=0.0)
    after = contents(state)
    assert {name: rows[0] for name, rows in before.items()} == {
        name: rows[0] for name, rows in after.items()
    }
    assert after["drafts"] == [[10, -1, -1, -1], [20, 21, -1, -1]]


def test_token_ids_may_be_the_tokens_themselves(device):
    state = make([5, 6, 7], [4, 1, 4], device)
    ops.draft_start(state)
    confidence = torch.tensor([1.0, 1.0, 0.0], device=device)
    ops.draft_advance(state, state.tokens, confidence, threshold=0.5)
    assert state.tokens.tolist() == [1000, 1001, 1002]
    assert state.drafts[:, 0].tolist() == [1000, 1001, 1002]


def test_a_second_round_forgets_the_first(device):
    state = make([5, 6], [4, 4], device)
    play(state)
    state.positions.copy_(torch.tensor([20, 3]))
    state.limits.copy_(torch.tensor([0, 2]))
    assert play(state, threshold=0.0)["counts"] == [0, 2]


def test_table_that_is_part_of_a_wider_one(device):
    """vLLM's block table is a view of a buffer for the longest request."""
    state = make([5, 17, 30], [4] * 3, device)
    wide = torch.full((3, 200), -5, dtype=torch.int32, device=device)
    wide[:, 100:112] = state.block_table
    state = dataclasses.replace(state, block_table=wide[:, 100:112])
    assert not state.block_table.is_contiguous()
    play(state)


def test_slots_past_2_to_the_31(device):
    """Block numbers fit 32 bits, slots do not."""
    state = make([5], [4], device)
    state.block_table.fill_(1 << 30)
    ops.draft_start(state)
    assert state.slots.tolist() == [(1 << 32) + 1]


def test_strided_tokens_and_confidence(device):
    state = make([5, 6, 7], [4] * 3, device)
    ops.draft_start(state)
    token_ids = torch.arange(6, device=device)[::2]
    confidence = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0], device=device)[::2]
    ops.draft_advance(state, token_ids, confidence, threshold=0.5)
    assert state.drafts[:, 0].tolist() == [0, 2, 4]
    assert state.active.tolist() == [True, True, False]


def test_the_twin_never_waits_for_the_device(device):
    """A drafting round is one stream of launches, without a look at the state between steps."""
    state = make([5, 17, -1], [4, 2, 0], device)
    ones = torch.ones(3, device=device)
    with no_host_sync():
        eager.draft_start(state)
        eager.draft_advance(state, state.tokens, ones, threshold=0.5)


@pytest.mark.gpu
def test_a_captured_round_is_right_for_other_rows(device):
    """Nothing of the state may have been baked into the CUDA graph."""
    state = make([5, 17, 30], [4, 2, 0], device)
    token_ids = torch.arange(3, device=device) + 50
    confidence = torch.tensor([1.0, 0.2, 1.0], device=device)

    def run():
        ops.draft_start(state)
        for _ in range(3):
            ops.draft_advance(state, token_ids, confidence, threshold=0.5)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    state.positions.copy_(torch.tensor([-1, 9, 3]))
    state.limits.copy_(torch.tensor([0, 4, 2]))
    confidence.copy_(torch.tensor([1.0, 1.0, 0.9]))
    naive = Naive(state)
    graph.replay()
    naive.start()
    for _ in range(3):
        naive.advance(token_ids.tolist(), confidence.tolist(), 0.5)
    assert contents(state) == naive.want


def test_no_rows(device):
    state = make([], [], device)
    ops.draft_start(state)
    nothing = torch.zeros(0, device=device)
    ops.draft_advance(state, nothing.long(), nothing, threshold=0.5)


@pytest.mark.parametrize("name", ["tokens", "lengths", "drafts", "block_table", "window_table"])
def test_misfits_are_refused(name, device):
    """Kernels trust the state: a wrong dtype or stride would be read as other numbers."""
    state = make([5, 6], [4, 4], device)
    tensor = getattr(state, name)
    other = tensor.short() if tensor.dim() == 1 else tensor.repeat(1, 2)[:, ::2]
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(state, **{name: other})
