# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of whole verify steps, for every draft length.

vLLM has graphs of whole steps in which all rows feed one same number of tokens, and we have it
choose 1 (`patches`, decode_graphs). A verify step would replay the pieces between attentions, whose
launches take the host 6.5 to 7.8 ms at 8B, where the GPU needs 5 (H200, batch 1 to 16). So whole
steps are captured for each number of tokens that a row may verify: 56 in 2 s and 0.63 GiB there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from knapspec_vllm import ops
from knapspec_vllm.draft.agreement import Agreement
from knapspec_vllm.draft.graphs import padded_rows, put_right
from knapspec_vllm.draft.rows import Candidates
from knapspec_vllm.metrics.stats import Stats

logger = logging.getLogger("vllm.knapspec")

_MOST_TOKENS = 256
"""Of a step. With more it computes for longer than its pieces take to launch."""


class VerifyGraphs:
    """The shapes of which one runner has graphs of whole verify steps; none before `capture`."""

    def __init__(self, num_speculative_tokens: int, draft_graphs: int) -> None:
        """draft_graphs: the setting; 0: none of these either."""
        self._most_tokens_per_row = 1 + num_speculative_tokens
        self._wanted = draft_graphs > 0
        #: Tokens per row -> numbers of rows, ascending.
        self._rows: dict[int, tuple[int, ...]] = {}
        self.memory_bytes = 0
        """Device memory that they took."""

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    @property
    def shapes(self) -> dict[int, tuple[int, ...]]:
        """Tokens per row -> numbers of rows of which whole verify steps are captured."""
        return self._rows

    @shapes.setter
    def shapes(self, shapes: dict[int, tuple[int, ...]]) -> None:
        """Of a runner in another process."""
        self._rows = shapes

    def find(self, tokens: int, rows: int, tokens_per_row: int) -> Any | None:
        """vLLM's BatchDescriptor of the smallest graph for so many rows; None if there is none, or
        not all of them feed `tokens_per_row` of the `tokens`."""
        if tokens != rows * tokens_per_row:
            return None
        found = next((n for n in self._rows.get(tokens_per_row, ()) if n >= rows), None)
        return None if found is None else _descriptor(found, tokens_per_row)

    def lengths(self, rows: Candidates, draft_length: int) -> list[int]:
        """How many tokens each row drafts of up to `draft_length`.

        A row that is about to end drafts as many as the others, in vain, where one graph can then
        verify them all: pieces would cost every row 2 ms (8B), and of 32 rows that draft 4 tokens
        of answers of 100 one is about to end in most steps.
        """
        clipped = [min(limit, draft_length) for limit in rows.limits]
        # Rows that have ended are in no further step.
        going = [bound for bound, left in zip(rows.bounds, rows.left, strict=True) if left > 0]
        if not going or min(going) < draft_length:
            return clipped
        count, tokens = len(going), 1 + draft_length
        if self.find(count * tokens, count, tokens) is None:
            return clipped
        return [draft_length if left > 0 else 0 for left in rows.left]

    def result(self, scheduler_output: Any) -> str | None:
        """How a step that vLLM has scheduled is verified: "whole" or in "pieces"; None where
        nothing is to be verified, or none are captured."""
        if not self._rows or not scheduler_output.scheduled_spec_decode_tokens:
            return None
        tokens = scheduler_output.num_scheduled_tokens
        longest = max(tokens.values())
        found = self.find(scheduler_output.total_num_scheduled_tokens, len(tokens), longest)
        return "pieces" if found is None else "whole"

    def count(self, scheduler_output: Any, stats: Stats) -> None:
        """A step is over."""
        if (result := self.result(scheduler_output)) is not None:
            stats.verify_steps[result] += 1

    def capture(self, runner: Any, capture: Callable[[Any], None]) -> None:
        """capture: vLLM's own, of a step with a descriptor, while it is capturing."""
        self._rows.clear()
        if not self._wanted:
            return
        if (refused := refusal(runner)) is not None:
            logger.info("KnapSpec has no graphs of whole verify steps: %s", refused)
            return
        agreement, free = Agreement(), _free_bytes(runner.device)
        try:
            for tokens_per_row, rows in self._shapes(runner.vllm_config):
                # vLLM has reserved nothing for them. On every rank or on none: they hold
                # collectives.
                if not agreement.share(2 * _free_bytes(runner.device) >= free):
                    logger.warning(
                        "KnapSpec stops at %d graphs of verify steps, which have taken half of the "
                        "free memory; others replay pieces. Lower gpu_memory_utilization or "
                        "num_speculative_tokens for all of them", len(self),
                    )  # fmt: skip
                    break
                self._capture(runner, tokens_per_row, rows, capture)
        except ops.launch_errors() as error:
            if not agreement.alone:  # the other ranks go on capturing
                raise
            logger.warning(
                "KnapSpec could not capture more than %d verify steps (%s); others replay pieces, "
                'and "draft_graphs": 0 does not try', len(self), error, exc_info=error,
            )  # fmt: skip
        self.memory_bytes = max(0, free - _free_bytes(runner.device))
        logger.info(
            "KnapSpec captured %d verify steps of up to %d tokens a row, %.2f GiB",
            len(self), max(self._rows, default=0), self.memory_bytes / (1 << 30),
        )  # fmt: skip

    def _shapes(self, config: Any) -> Iterator[tuple[int, int]]:
        """(tokens per row, rows), short drafts first; of each, as vLLM does, more rows first:
        fewer reuse their memory."""
        most_rows = config.scheduler_config.max_num_seqs
        most_tokens = min(_MOST_TOKENS, config.compilation_config.max_cudagraph_capture_size or 0)
        for tokens_per_row in range(2, self._most_tokens_per_row + 1):
            for rows in reversed(padded_rows(min(most_rows, most_tokens // tokens_per_row))):
                yield tokens_per_row, rows

    def _capture(
        self, runner: Any, tokens_per_row: int, rows: int, capture: Callable[[Any], None]
    ) -> None:
        before = self._rows.get(tokens_per_row, ())
        self._rows[tokens_per_row] = (rows, *before)  # it asks `find` what it captures
        try:
            with _undone(runner.device), tokens_a_row(runner, tokens_per_row):
                capture(_descriptor(rows, tokens_per_row))
        except BaseException:
            self._rows[tokens_per_row] = before
            raise


def refusal(runner: Any) -> str | None:
    """Why whole verify steps of a runner are not captured; None if they can be."""
    from vllm.v1.attention.backend import AttentionCGSupport

    config = runner.vllm_config
    if config.parallel_config.data_parallel_size > 1:
        return "data-parallel ranks agree on each step's graph"
    if getattr(config.compilation_config.pass_config, "enable_sp", False):
        return "sequence parallelism pads the tokens of a step"
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = type(group.get_metadata_builder())
        support = builder.get_cudagraph_support(config, group.kv_cache_spec)
        if support.value < AttentionCGSupport.UNIFORM_BATCH.value:
            return f"{group.backend.get_name()} attention cannot be captured for several tokens"
    return None


@contextmanager
def tokens_a_row(runner: Any, tokens_per_row: int) -> Iterator[None]:
    """Inside, a dummy step of the runner that is to be uniform feeds so many tokens a row."""
    before = runner.uniform_decode_query_len
    runner.uniform_decode_query_len = tokens_per_row
    try:
        yield
    finally:
        runner.uniform_decode_query_len = before


def _descriptor(rows: int, tokens_per_row: int) -> Any:
    from vllm.forward_context import BatchDescriptor

    return BatchDescriptor(rows * tokens_per_row, num_reqs=rows, uniform=True)


def _undone(device: torch.device) -> AbstractContextManager[None]:
    if device.type != "cuda":
        return nullcontext()
    from vllm.platforms import current_platform

    return put_right(device, current_platform.get_global_graph_pool())


def _free_bytes(device: torch.device) -> int:
    """Without returning what torch has cached, which vLLM's captures reuse."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
