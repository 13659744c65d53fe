# SPDX-License-Identifier: Apache-2.0
"""Window block tables, slots and row selection, on plain tensors."""

import pytest
import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.metadata import slots_of
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.draft.windows import WindowGeometry


def tokens_read(table: torch.Tensor, length: int, block_size: int) -> list[int]:
    """Physical slots that paged attention reads through a block table, in order."""
    return [int(table[p // block_size]) * block_size + p % block_size for p in range(length)]


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("window", [1, 7, 16, 33])
@pytest.mark.parametrize("sinks", [0, 1, 5])
def test_window_reads_sinks_and_recent_tokens(block_size: int, window: int, sinks: int) -> None:
    """At every length and step of a round: at least the window and the sinks, and no others."""
    geometry = WindowGeometry.of(sinks, window, block_size)
    draft_length = 6
    blocks = torch.arange(100, 164, dtype=torch.int32)
    starts = [0, 1, block_size - 1, block_size, 40, 41, 97]
    state = ops.DraftState.allocate(
        len(starts),
        draft_length,
        blocks.expand(len(starts), -1),
        block_size=block_size,
        max_model_len=1000,
        sink_blocks=geometry.sink_blocks,
        window_tokens=window,
    )
    state.positions.copy_(torch.tensor(starts))
    state.limits.fill_(draft_length)
    ops.draft_start(state)
    for step in range(draft_length):
        for row, position in enumerate(starts):
            length = position + step + 1
            kept = int(state.window_lengths[row])
            slots = tokens_read(state.window_table[row], kept, block_size)
            everything = tokens_read(blocks, length, block_size)
            assert set(slots) <= set(everything)
            assert len(set(slots)) == kept
            assert slots == sorted(slots)
            assert set(everything[max(0, length - window) :]) <= set(slots)
            assert set(everything[:sinks]) <= set(slots)
            assert geometry.kept_tokens(length) == kept
        ops.draft_advance(state, state.tokens, torch.ones(len(starts)), threshold=0.5)


def test_window_is_bounded() -> None:
    geometry = WindowGeometry.of(64, 512, 16)
    assert geometry.kept_tokens(100_000) < 64 + 512 + 16
    assert geometry.kept_tokens(300) == 300


def test_slots() -> None:
    table = torch.tensor([[7, 3, 9], [2, 4, 0]], dtype=torch.int32)
    positions = torch.tensor([[0, 5, 11], [3, 4, 7]])
    assert slots_of(table, positions, 4).tolist() == [[28, 13, 39], [11, 16, 19]]


def test_rows_of_the_runner_s_batch_in_their_order() -> None:
    candidates = Candidates(
        index=[0, 2, 1],
        req_ids=["a", "b", "c"],
        tokens=[10, 11, 12],
        positions=[4, 9, 30],
        bounds=[1, 4, 4],
        left=[9, 3, -1],
    )
    assert candidates.limits == [1, 2, 0]
    assert candidates.context_tokens == 4 + 9 + 30 + 3
    table = torch.arange(6, dtype=torch.int32).view(3, 2)
    rows = candidates.to_rows(table, torch.device("cpu"))
    assert rows.block_table.tolist() == [[0, 1], [4, 5], [2, 3]]
    assert rows.tokens.tolist() == [10, 11, 12]
    assert rows.positions.tolist() == rows.host_positions == [4, 9, 30]
