# SPDX-License-Identifier: Apache-2.0
"""The target's forward as vLLM's V1 runner runs it, to be timed before anything is served.

Where vLLM replays CUDA graphs, those read buffers of its runner: of a whole step all its inputs, of
pieces the token ids and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from knapspec_vllm.draft.metadata import StepMetadata, slots_of
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.draft.verify_graphs import tokens_a_row

Forward = Callable[[], torch.Tensor]
"""Final states [at least B * q, d] of B rows of q tokens each, row by row."""


class Target:
    """One runner's target, while the runner has no requests."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        #: The compiled (or eager) module.
        self.model = runner.model
        self._table = runner.input_batch.block_table[0]

    @contextmanager
    def step(
        self, metadata: StepMetadata, rows: DraftRows, tokens_per_row: int
    ) -> Iterator[Forward]:
        """A step in which the rows, all equally long, feed so many tokens from their positions on;
        to be run any number of times inside the block."""
        graph = self._graph(len(rows), tokens_per_row)
        offsets = torch.arange(tokens_per_row, device=rows.positions.device)
        positions = rows.positions[:, None] + offsets
        slots = slots_of(rows.block_table, positions, int(self._table.block_size)).flatten()
        # vLLM's runner feeds int32 ids: another dtype would make a compiled target trace again.
        ids, where = rows.tokens.repeat_interleave(tokens_per_row).int(), positions.flatten()
        if graph is not None:
            size = graph["batch_descriptor"].num_tokens
            ids = _entered(ids, self._runner.input_ids.gpu[:size])
            where = _entered(where, self._runner.positions[:size])
            slots = torch.nn.functional.pad(slots, (0, size - len(slots)), value=-1)
            if graph["cudagraph_runtime_mode"].name == "FULL":
                with (
                    self._blocks_of(rows),
                    self._real_metadata(),
                    tokens_a_row(self._runner, tokens_per_row),
                ):
                    yield lambda: self._whole(rows, tokens_per_row)
                return

        def launched() -> torch.Tensor:
            built = metadata.build(
                rows.block_table,
                rows.positions + tokens_per_row,
                slots,
                where,
                rows.host_positions[0] + tokens_per_row,
                tokens_per_row,
            )
            with metadata.active(built, slots, **(graph or {})):
                return self.model(
                    input_ids=ids, positions=where, intermediate_tensors=None, inputs_embeds=None
                )

        yield launched

    def _graph(self, rows: int, tokens_per_row: int) -> dict[str, Any] | None:
        """What vLLM's forward context holds for such a step, if it replays graphs."""
        runner = self._runner
        if runner.vllm_config.parallel_config.data_parallel_size > 1:
            return None  # ranks agree on a step's graph, and have different times to measure
        mode, descriptor, *_ = runner._determine_batch_execution_and_padding(
            num_tokens=rows * tokens_per_row,
            num_reqs=rows,
            num_scheduled_tokens_np=np.full(rows, tokens_per_row, dtype=np.int32),
            max_num_scheduled_tokens=tokens_per_row,
            use_cascade_attn=False,
        )
        if mode.name == "NONE":
            return None
        return {"cudagraph_runtime_mode": mode, "batch_descriptor": descriptor}

    def _whole(self, rows: DraftRows, tokens_per_row: int) -> torch.Tensor:
        """By vLLM's own dummy step, which stages what its graph reads. It writes no K/V."""
        states, _ = self._runner._dummy_run(
            len(rows) * tokens_per_row,
            force_attention=True,
            uniform_decode=True,
            profile_seq_lens=rows.host_positions[0] + tokens_per_row,
        )
        return states

    @contextmanager
    def _real_metadata(self) -> Iterator[None]:
        """A dummy step of vLLM 0.29 on asks for metadata as for a capture, in which some backends
        (Triton, ROCm) make every context one token long."""
        build = self._runner._build_attention_metadata

        def built(*args: Any, **kwargs: Any) -> Any:
            return build(*args, **{**kwargs, "for_cudagraph_capture": False})

        self._runner._build_attention_metadata = built
        try:
            yield
        finally:
            del self._runner._build_attention_metadata  # the class's own again

    @contextmanager
    def _blocks_of(self, rows: DraftRows) -> Iterator[None]:
        """The rows' blocks in the runner's table, which a dummy step reads."""
        count, width = rows.block_table.shape
        staged = self._table.block_table.np[:count, :width]
        staged[:] = rows.block_table.cpu().numpy()
        try:
            yield
        finally:
            if self._runner.device.type != "cpu":  # copies from there may be under way
                torch.accelerator.synchronize()
            staged[:] = 0
            self._table.commit_block_table(count)


def _entered(values: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, in which the values come first."""
    buffer[: len(values)].copy_(values)
    return buffer
