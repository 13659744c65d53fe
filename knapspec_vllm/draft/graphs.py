# SPDX-License-Identifier: Apache-2.0
"""Draft steps captured once and replayed: one launch instead of several hundred.

A step is one forward of a plan with its head and the advance of the rows. All that differs from
round to round lies in a `DraftState` at addresses that stay, so one captured step serves every
draft length and, padded, every batch up to its number of rows. Its plan and that number are its
key.

The pool is bounded, and the plan used longest ago goes first. A key is captured when it comes a
second time: the first round runs launch by launch, which also compiles what is missing, and a plan
that is tried once costs no capture. Each time that as many steps have been dropped as there is room
for, a key has to come twice as often: captures halt the requests of a round. Where capturing fails
everything goes on launch by launch.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.engine import Engine
from knapspec_vllm.planner.types import Plan

logger = logging.getLogger("vllm.knapspec")

Step = Callable[[], None]
"""One draft forward of all rows, and their advance by one token."""

Capture = Callable[[Step], Step]
"""From a step to what repeats it without Python; raises RuntimeError where that cannot be done."""

Key = tuple[Plan, int]

#: Keys that have been seen but not captured; a bound for servers whose plans keep changing.
_MOST_SEEN = 1024


class CudaCapture:
    """Captures in a CUDA graph; all graphs take their temporary memory from one pool.

    They may: only one of them runs at a time, and nothing of it is read after the next has begun.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        #: A pool whose last graph is gone cannot be captured into again, so this one stays.
        self._keeper: Step | None = None

    def __call__(self, step: Step) -> Step:
        if self._keeper is None:
            cell = torch.zeros(1, device=self._device)

            def touch() -> None:
                cell.zero_()

            self._keeper = self._captured(touch)
        return self._captured(step)

    def _captured(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # thread_local: vLLM's other threads copy results meanwhile, and may.
        with (
            put_right(self._device, self._pool),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            step()
        return graph.replay


@contextmanager
def put_right(device: torch.device, pool: tuple[int, int]) -> Iterator[None]:
    """Around a capture into a pool: where beginning or ending it fails, torch leaves its capture
    stream current, and the allocator capturing; the target would go on there."""
    before = torch.cuda.current_stream(device)
    try:
        yield
    except Exception:
        torch.cuda.set_stream(before)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(before.device_index, pool)
        raise


def refusal(engine: Engine, most: int) -> str | None:
    """Why draft steps of this engine are not captured; None if they can be."""
    config = engine.vllm_config
    if most == 0:
        return 'switched off by "draft_graphs": 0'
    if engine.device.type != "cuda":
        return "only CUDA devices have graphs"
    if config.model_config.enforce_eager:
        return "the server runs with --enforce-eager"
    if getattr(config.compilation_config.cudagraph_mode, "name", "") == "NONE":
        return "the server runs with cudagraph_mode NONE"
    if config.parallel_config.world_size > 1:
        return "several ranks exchange data within a step"
    if not ops.uses_triton(torch.empty(0, device=engine.device)):
        return "KNAPSPEC_KERNELS=eager"
    return None


@dataclass(frozen=True)
class CapturedStep:
    """A step over a state of its own, which rows enter before each round."""

    state: ops.DraftState
    replay: Step


class StepSource(Protocol):
    """What steps are made of: the drafter."""

    def new_state(self, block_table: torch.Tensor, draft_length: int) -> ops.DraftState:
        """Padding rows over this block table [B, W] int32, which is kept and not copied."""

    def steps(
        self, plan: Plan, state: ops.DraftState, longest: int
    ) -> AbstractContextManager[Step]:
        """The plan's step over a state; longest: upper bound of its rows' lengths."""


def padded_rows(most: int) -> list[int]:
    """Batches that are captured, ascending: powers of two up to 8, then multiples of 8, and `most`
    itself."""
    sizes = {*(n for n in (1, 2, 4, 8) if n <= most), *range(16, most + 1, 8)}
    return sorted(sizes | ({most} if most > 0 else set()))


class StepGraphs:
    """The captured steps of one drafter, at most `most` of them."""

    def __init__(
        self,
        source: StepSource,
        engine: Engine,
        draft_length: int,
        most: int,
        results: Counter[str],
        capture: Capture,
    ) -> None:
        """draft_length: of the longest drafts.

        results counts rounds by "hit" (replayed) and "miss" (not captured before), and captures by
        "captured", "evicted" and "failed".
        """
        self._source, self._engine, self._capture = source, engine, capture
        self._draft_length, self._most, self._results = draft_length, most, results
        self._rows = engine.vllm_config.scheduler_config.max_num_seqs
        self._sizes = padded_rows(self._rows)
        #: [rows, W] int32: where the states keep their rows' blocks, as one drafts at a time.
        self._block_table: torch.Tensor | None = None
        #: By number of rows; shared by all plans.
        self._states: dict[int, ops.DraftState] = {}
        self._steps: OrderedDict[Key, CapturedStep] = OrderedDict()
        #: Rounds of a key without a captured step.
        self._seen: OrderedDict[Key, int] = OrderedDict()
        self._evicted = 0
        self._failed = False
        self.settled = True
        """Whether the last round found runs as later ones of its kind will."""
        self.memory_bytes = 0
        """Device memory that captures took."""

    def find(self, plan: Plan, rows: int) -> CapturedStep | None:
        """The plan's step for `rows` rows or a few more; None: run this round launch by launch."""
        if self._failed:
            self.settled = True
            return None
        key = plan, self._padded(rows)
        if key in self._steps:
            self.settled = True
            self._steps.move_to_end(key)
            self._results["hit"] += 1
            return self._steps[key]
        self._results["miss"] += 1
        news = key not in self._seen
        self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        captures = self._seen[key] >= 2 << min(self._evicted // self._most, 16)
        self.settled = not (news or captures)
        return self._add(key) if captures else None

    def made(self, plan: Plan, rows: int) -> CapturedStep | None:
        """The same for a measurement: captured now if need be, and not counted as a round."""
        key = plan, self._padded(rows)
        if self._failed or key in self._steps:
            return self._steps.get(key)
        return self._add(key)

    def clear(self) -> None:
        """Drops every step, and forgets that any were; the plans that calibration times are not
        those that draft."""
        self._steps.clear()
        self._seen.clear()
        self._evicted = self.memory_bytes = 0

    def _padded(self, rows: int) -> int:
        return next(size for size in self._sizes if size >= rows)

    def _add(self, key: Key) -> CapturedStep | None:
        plan, rows = key
        if len(self._steps) >= self._most:
            self._steps.popitem(last=False)
            self._evicted += 1
            self._results["evicted"] += 1
        free = _free_bytes(self._engine.device)
        try:
            captured = self._captured(plan, rows)
        except ops.launch_errors() as error:
            self._note_failure(error)
            return None
        self.memory_bytes += max(0, free - _free_bytes(self._engine.device))
        self._steps[key] = captured
        self._seen[key] = 0
        self._results["captured"] += 1
        return captured

    def _note_failure(self, error: Exception) -> None:
        self._results["failed"] += 1
        if isinstance(error, torch.OutOfMemoryError) and self._steps:
            self._most = len(self._steps)
            what = f"has no memory for more than {self._most} captured draft steps"
        else:
            self._failed = True
            self._steps.clear()
            what = "could not capture a draft step and drafts launch by launch from now on"
        logger.warning(
            'KnapSpec %s (%s); "draft_graphs": %d does not try',
            what,
            error,
            0 if self._failed else self._most,
            exc_info=error,
        )

    def _captured(self, plan: Plan, rows: int) -> CapturedStep:
        engine = self._engine
        if self._block_table is None:
            width = -(-engine.max_model_len // engine.block_size)
            self._block_table = torch.zeros(
                self._rows, width, dtype=torch.int32, device=engine.device
            )
        if rows not in self._states:
            table = self._block_table[:rows]
            self._states[rows] = self._source.new_state(table, self._draft_length)
        state = self._states[rows]
        # Padding rows, which write no K/V.
        state.limits.zero_()
        state.positions.zero_()
        ops.draft_start(state)
        # What is captured has to serve the longest context; rows are cut by their own length.
        with self._source.steps(plan, state, engine.max_model_len) as step:
            step()  # compiles what this number of rows still lacks
            return CapturedStep(state, self._capture(step))


def _free_bytes(device: torch.device) -> int:
    """As a capture finds it, which returns what torch has cached."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
