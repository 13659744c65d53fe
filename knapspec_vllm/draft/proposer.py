# SPDX-License-Identifier: Apache-2.0
"""Route A: KnapSpec as a `custom_class` proposer of vLLM's V1 model runner.

Turns the runner's state into `DraftRows`, lets `Planning` choose and `Drafter` draft. Only this
file, `runner_rows`, `target`, `verify_graphs`, `async_*` and `patches/` know which vLLM
runner calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from knapspec_vllm import models
from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.draft.agreement import Agreement
from knapspec_vllm.draft.async_drafting import AsyncDrafting
from knapspec_vllm.draft.async_planning import AsyncPlanning
from knapspec_vllm.draft.cache_layout import bind_layers
from knapspec_vllm.draft.drafter import Drafter
from knapspec_vllm.draft.engine import Engine, own_attention_groups
from knapspec_vllm.draft.graphs import CudaCapture, StepGraphs, refusal
from knapspec_vllm.draft.head import HeadKind
from knapspec_vllm.draft.invariants import InvariantGuard
from knapspec_vllm.draft.observed import Verified
from knapspec_vllm.draft.planning import Planning
from knapspec_vllm.draft.references import References, newest_passages
from knapspec_vllm.draft.round_clock import RoundClock
from knapspec_vllm.draft.rows import Candidates, DraftRows
from knapspec_vllm.draft.runner_rows import of_runner
from knapspec_vllm.draft.screened_head import ScreenedHead, screen_of
from knapspec_vllm.draft.snapshot import snapshot
from knapspec_vllm.draft.target import Target
from knapspec_vllm.draft.verify_graphs import VerifyGraphs
from knapspec_vllm.draft.windows import WindowGeometry
from knapspec_vllm.metrics.stats import Stats
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.types import Batch, Choice, Frontier, Plan

logger = logging.getLogger("vllm.knapspec")


class KnapSpecProposer:
    """Drafts with the target's own sublayers. Constructed by vLLM with its VllmConfig."""

    def __init__(self, vllm_config: Any) -> None:
        self.config = KnapSpecConfig.from_vllm_config(vllm_config)
        self.num_speculative_tokens: int = vllm_config.speculative_config.num_speculative_tokens
        self._vllm_config = vllm_config
        self.stats = Stats()
        self.engine: Engine | None = None
        self.planning: Planning | None = None
        #: Requests that drafted in the last round, and the plan that they drafted with.
        self._drafted: set[str] = set()
        self._drafted_plan: Plan | None = None
        #: A head that may be faster than the model's, where there is one.
        self.screen: ScreenedHead | None = None
        self._clock = RoundClock(self.stats)
        self.verify_graphs = VerifyGraphs(self.num_speculative_tokens, self.config.draft_graphs)
        #: Drafts instead of `propose_full` where vLLM schedules asynchronously.
        self.asynchronous: AsyncDrafting | None = None
        #: What its scheduler asks, if that has to; one of workers in other processes has its own.
        self.scheduling: AsyncPlanning | None = None
        #: Where the cost curves come from: "source", "hardware", "measured_at" (seconds, epoch),
        #: and what was chosen with them: "attention", "head".
        self.calibration: dict[str, Any] = {}
        #: Beyond plain vLLM's, by kind.
        self.memory_bytes: dict[str, int] = {}

    def load_model(self, target: torch.nn.Module) -> None:
        """Called by vLLM after the target's weights are loaded; refuses unknown layer kinds."""
        view = models.bind(target)
        # Now, because what is allocated after vLLM has measured its memory is not accounted for.
        self.screen = screen_of(view, self.config, self._vllm_config)

    def attach(self, runner: Any) -> None:
        """Bind to a V1 runner whose KV cache is allocated. Idempotent."""
        if self.engine is not None:
            return
        view = models.bind(runner.get_model())
        layers = [view.attention_layer(i) for i in range(view.num_layers)]
        block_size = int(runner.input_batch.block_table[0].block_size)
        cache_config = runner.kv_cache_config
        manager_block_size = cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.engine = Engine(
            vllm_config=self._vllm_config,
            view=view,
            target=Target(runner),
            attention_groups=own_attention_groups(
                runner.attn_groups[0], self._vllm_config, runner.device
            ),
            layer_names=tuple(layer.layer_name for layer in layers),
            device=runner.device,
            block_size=block_size,
            num_blocks=int(cache_config.num_blocks) * (manager_block_size // block_size),
            max_model_len=int(runner.max_model_len),
            paged_kv=bind_layers(layers, block_size),
        )
        self.geometry = WindowGeometry.of(
            self.config.sink_tokens, self.config.window_tokens, block_size
        )
        self.agreement = Agreement()
        self.drafter = Drafter(self.engine, self.geometry, self.config.confidence_threshold)
        if self.config.draft_attention == "kernel":
            if not self.engine.paged_kv:
                raise ValueError(
                    "draft_attention=kernel needs a KV cache whose layout KnapSpec can read; this "
                    'attention backend\'s is not: write "draft_attention": "backend"'
                )
            self.drafter.attention_path = "kernel"
        if (refused := refusal(self.engine, self.config.draft_graphs)) is None:
            self.drafter.graphs = StepGraphs(
                self.drafter, self.engine, self.num_speculative_tokens, self.config.draft_graphs,
                self.stats.graphs, CudaCapture(self.engine.device),
            )  # fmt: skip
        elif self.engine.device.type != "cpu":
            logger.info("KnapSpec drafts launch by launch, without CUDA graphs: %s", refused)
        if getattr(runner, "use_async_scheduling", False):
            self.asynchronous = AsyncDrafting(self, runner)
            self.scheduling = AsyncPlanning(self.asynchronous)
        if self.config.draft_head == "screened":
            self.use_head("screened")
        self._guard = InvariantGuard(self.engine) if self.config.debug_invariants else None

    def use_head(self, kind: HeadKind) -> None:
        """Draft with this head from now on; a screen that is not used is given up."""
        assert kind == "full" or self.screen is not None
        if kind == "full":
            self.screen = None
        self.drafter.head.screen = self.screen

    def use(
        self,
        costs: CostModel | None,
        frontier: Frontier | None,
        on_frontier: Callable[[Frontier], None],
    ) -> None:
        """Start planning with these cost curves; `on_frontier` receives every solved frontier."""
        assert self.engine is not None
        self.planning = Planning(
            self.config,
            self.engine,
            self.geometry,
            self.agreement,
            self.stats,
            self.num_speculative_tokens,
            costs,
            frontier,
            on_frontier,
        )

    @property
    def planner(self) -> Planning:
        """`planning`; without cost curves if nobody has given any."""
        if self.planning is None:
            self.use(None, None, lambda frontier: None)
        assert self.planning is not None
        return self.planning

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM's plain custom_class entry, which lacks what a KV-writing drafter needs."""
        raise RuntimeError(
            "KnapSpec's vLLM patches are not installed in this process: check that VLLM_PLUGINS, "
            "if set, lists knapspec, and that the knapspec-vllm package is installed on every node"
        )

    def propose_full(
        self,
        runner: Any,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        common_attn_metadata: Any,
        **_: Any,
    ) -> list[list[int]]:
        """Draft for every row of the runner's batch; [] for rows that draft nothing.

        sampled_token_ids: tokens vLLM just sampled for each row, [] while a row is in prefill.
        """
        self._clock.entered()
        self.attach(runner)
        planning = self.planner
        assert self.engine is not None
        self.verify_graphs.count(scheduler_output, self.stats)
        self._learn(runner, scheduler_output, sampled_token_ids)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        scheduled = scheduler_output.total_num_scheduled_tokens
        # A token a row: what ends a prompt's last chunk is none of plain decoding.
        alone = all(sampled_token_ids) and scheduled == len(sampled_token_ids)
        steady = alone and self._clock.running
        if planning.rests(runner.input_batch.req_ids, steady):
            self._clock.rested()
            return drafts
        most = getattr(scheduler_output, "num_spec_tokens_to_schedule", None)
        most = self.num_speculative_tokens if most is None else int(most)
        rows = of_runner(runner, self.engine, sampled_token_ids, most, self.stats)
        if len(rows) == 0:
            self._clock.stop()
            return drafts
        self._clock.verified(planning, rows, scheduled, sampled_token_ids)
        table = common_attn_metadata.block_table_tensor
        batch = Batch(len(rows), rows.context_tokens, rows.room)
        solved_us = self.stats.phase_us["solve"]
        choice = planning.choose(
            batch,
            max(rows.limits),
            lambda: self._references(runner, rows, table),
            rows.opted_out == len(rows),
        )
        draft_us, forwards = 0.0, 0
        if choice.plan is not None:
            start = time.perf_counter()
            found = self._draft(choice, runner, rows.to_rows(table, self.engine.device))
            draft_us = (time.perf_counter() - start) * 1e6
            forwards = self.drafter.forwards
            for i, draft in zip(rows.index, found, strict=True):
                drafts[i] = draft
        lengths = [len(drafts[i]) for i in rows.index]
        solve_us = self.stats.phase_us["solve"] - solved_us
        unusual = solve_us > 0 or planning.solving.under_way
        unusual |= choice.plan is not None and not self.drafter.settled
        self._clock.ended(batch, rows, choice, lengths, forwards, draft_us, solve_us, unusual)
        return drafts

    def stood_still(self) -> None:
        """The engine did not run for a while: what the present round takes teaches nothing."""
        self._clock.stop()
        if self.asynchronous is not None:
            self.asynchronous.stood_still()

    def snapshot(self) -> dict[str, Any]:
        """What the planner did so far, JSON-ready; see `draft.snapshot`."""
        return snapshot(self)

    def _draft(self, choice: Choice, runner: Any, rows: DraftRows) -> list[list[int]]:
        assert choice.plan is not None
        if self._guard is not None:
            counts = runner.input_batch.block_table[0].num_blocks_per_row
            self._guard.before(rows, [int(counts[i]) for i in rows.index], choice.draft_length)
        drafts = self.drafter.draft(choice.plan, choice.draft_length, rows)
        if self._guard is not None:
            self._guard.after(drafts)
        self.stats.drafting_rounds += 1
        self.stats.draft_tokens += sum(map(len, drafts))
        pairs = zip(rows.req_ids, drafts, strict=True)
        self._drafted = {req_id for req_id, draft in pairs if draft}
        self._drafted_plan = choice.plan
        return drafts

    def _learn(
        self, runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]]
    ) -> None:
        """Acceptance of the drafts that vLLM has just verified."""
        assert self.planning is not None
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        if not scheduled and not self._drafted:
            return
        verified = []
        for req_id, sampled in zip(runner.input_batch.req_ids, sampled_token_ids, strict=False):
            drafted, count = req_id in self._drafted, len(scheduled.get(req_id, ()))
            if not drafted:
                self.stats.placeholder_tokens += count
            if not drafted or not count or not sampled:
                continue
            request = runner.requests[req_id]
            free = getattr(request.sampling_params, "structured_outputs", None) is None
            kept = min(len(sampled) - 1, count)
            verified.append(Verified(kept, count, request.num_tokens, free))
        if verified:
            assert self._drafted_plan is not None
            self.planning.feedback(self._drafted_plan, verified, self.planning.drafting_context)
        self._drafted.clear()

    def _references(self, runner: Any, rows: Candidates, table: torch.Tensor) -> References | None:
        assert self.engine is not None
        assert self.planning is not None
        known = runner.input_batch.token_ids_cpu
        found = newest_passages(
            rows,
            lambda i, start, stop: known[rows.index[i], start:stop].tolist(),
            self.planning.wanted,
        )
        if found is None:
            return None
        return found.on_device(self.engine, runner.input_batch.req_id_to_index, table)
