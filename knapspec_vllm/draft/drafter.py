# SPDX-License-Identifier: Apache-2.0
"""Drafts tokens by running a plan's sublayers over the target's weights and paged KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.attention import (
    AttentionPath,
    BackendAttention,
    Cores,
    DraftAttention,
    KernelAttention,
)
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.draft.graphs import CapturedStep, Step, StepGraphs
from knapspec_vllm.draft.head import GreedyHead
from knapspec_vllm.draft.rows import DraftRows
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.models.view import SublayerView
from knapspec_vllm.planner.types import Mode, Plan


@dataclass(frozen=True)
class Round:
    """Rows at their positions, and what drafts for them: `steps` yields one `Step` to repeat."""

    state: ops.DraftState
    steps: Callable[[], AbstractContextManager[Step]]


class Drafter:
    """Greedy drafts of differing lengths for the rows of one round.

    Proposals are the argmax of the draft's logits, a deterministic function of the prefix; vLLM's
    rejection sampler therefore treats the draft distribution as one-hot, and cutting a draft short
    at any point keeps the output distribution exact.
    """

    def __init__(
        self, engine: Engine, geometry: WindowGeometry, confidence_threshold: float
    ) -> None:
        self._engine = engine
        self._geometry = geometry
        self._threshold = confidence_threshold
        self._attention: dict[AttentionPath, DraftAttention] = {
            "backend": BackendAttention(engine),
            "kernel": KernelAttention(engine, geometry),
        }
        self.head = GreedyHead(engine.view, confident=confidence_threshold > 0)
        self.attention_path: AttentionPath = "backend"
        #: Captured steps of the kernel path (a backend makes its metadata on the host).
        self.graphs: StepGraphs | None = None
        #: Steps that the last round ran.
        self.forwards = 0

    @torch.inference_mode()
    def draft(self, plan: Plan, draft_length: int, rows: DraftRows) -> list[list[int]]:
        """Up to `draft_length` tokens for each row, in the rows' order.

        A row stops at its limit, or after a token whose top-1 probability is under the confidence
        threshold (that token is still proposed: its forward has been paid for). Which rows go on
        is decided on the device; the host reads the result once, at the end.
        """
        draft_length = min(draft_length, max(rows.limits, default=0))
        if draft_length <= 0:
            self.forwards = 0
            return [[] for _ in range(len(rows))]
        state = self.run(plan, draft_length, rows)
        counts, *columns = torch.cat([state.counts[None].long(), state.drafts.T]).tolist()
        return [[column[i] for column in columns[: counts[i]]] for i in range(len(rows))]

    def run(self, plan: Plan, draft_length: int, rows: DraftRows) -> ops.DraftState:
        """The rows, the first of the state, after `draft_length` steps; on the device, where it may
        still be computed. What a row did not draft is -1."""
        started = self.start(plan, draft_length, rows, self.captured(plan, len(rows)))
        with started.steps() as step:
            for self.forwards in range(1, draft_length + 1):
                step()
                if self._may_stop_early and not started.state.active.any():
                    break
        return started.state

    def start(
        self,
        plan: Plan,
        draft_length: int,
        rows: DraftRows,
        captured: CapturedStep | None = None,
    ) -> Round:
        """The rows before the first of `draft_length` steps, at least one.

        captured: the plan's step for this number of rows, else it runs launch by launch.
        """
        if captured is not None:
            rows.enter(captured.state, draft_length)
            return Round(captured.state, lambda: nullcontext(captured.replay))
        windowed = self.attention_path == "backend" and Mode.WINDOW in plan.modes
        state = self.new_state(rows.block_table, draft_length, windowed)
        rows.enter(state, draft_length)
        longest = max(rows.host_positions) + draft_length
        return Round(state, lambda: self.steps(plan, state, longest))

    def new_state(
        self, block_table: torch.Tensor, draft_length: int, windowed: bool = False
    ) -> ops.DraftState:
        """Padding rows that may draft `draft_length` tokens; block_table [B, W] int32 is kept."""
        return ops.DraftState.allocate(
            len(block_table),
            draft_length,
            block_table,
            block_size=self._engine.block_size,
            max_model_len=self._engine.max_model_len,
            sink_blocks=self._geometry.sink_blocks,
            window_tokens=self._geometry.window_tokens if windowed else 0,
        )

    @contextmanager
    def steps(self, plan: Plan, state: ops.DraftState, longest: int) -> Iterator[Step]:
        """The step of a round, launch by launch, to be called for one token after another.

        longest: host-side upper bound of the rows' lengths in any of them.
        """
        view, attention = self._engine.view, self._attention[self.attention_path]
        with attention.round(plan, state, longest) as (core_of, refresh):

            def step() -> None:
                refresh()
                hidden = run_plan(view, plan, state.tokens, state.positions, core_of)
                tokens, confidence = self.head(hidden)
                ops.draft_advance(state, tokens, confidence, threshold=self._threshold)

            yield step

    def captured(self, plan: Plan, rows: int, *, measured: bool = False) -> CapturedStep | None:
        """The plan's captured step for a round of `rows` rows, or, measured, of what such rounds
        come to run; see `StepGraphs`."""
        if self.graphs is None or self.attention_path != "kernel":
            return None
        return (self.graphs.made if measured else self.graphs.find)(plan, rows)

    @property
    def settled(self) -> bool:
        """Whether the last round ran as later ones of its kind will; see `StepGraphs.find`."""
        return self.graphs is None or self.graphs.settled

    @property
    def _may_stop_early(self) -> bool:
        """Looking costs nothing on a CPU; a GPU would have to be waited for."""
        return self._threshold > 0 and self._engine.device.type == "cpu"


def run_plan(
    view: SublayerView,
    plan: Plan,
    # [T] int64
    token_ids: torch.Tensor,
    # [T] int64
    positions: torch.Tensor,
    core_of: Cores = lambda layer: None,
) -> torch.Tensor:
    """Output states [T, d] of the plan's sublayers; needs a forward context.

    core_of: attention core of a layer; None stands for vLLM's attention module.
    """
    delta, residual = None, view.embed(token_ids)
    for layer in range(view.num_layers):
        if plan.attention(layer) != Mode.SKIP:
            delta, residual = view.attention(layer, positions, delta, residual, core_of(layer))
        if plan.mlp(layer) != Mode.SKIP:
            delta, residual = view.mlp(layer, delta, residual)
    return view.final_hidden(delta, residual)
