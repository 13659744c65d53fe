# SPDX-License-Identifier: Apache-2.0
"""`knapspec plan`: what the planner would choose for batches and contexts, on the real model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knapspec_vllm.commands.output import under_way
from knapspec_vllm.planner.types import Batch, Mode, Plan


@dataclass(frozen=True)
class PlanRow:
    """One plan of the frontier, priced for one batch."""

    plan: Plan
    draft_length: int
    acceptance: float
    #: Share of the items' time that the plan saves.
    saving: float
    predicted_speedup: float


@dataclass(frozen=True)
class PlanTable:
    """The frontier of one batch, best first, and what the policy decides."""

    rows: int
    context: int
    entries: tuple[PlanRow, ...]
    decision: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "batch": self.rows,
            "context": self.context,
            "decision": self.decision,
            "frontier": [
                {
                    "plan": row.plan.to_text(),
                    "draft_length": row.draft_length,
                    "acceptance": row.acceptance,
                    "saving": row.saving,
                    "predicted_speedup": row.predicted_speedup,
                }
                for row in self.entries
            ],
        }


def plan_tables(
    model: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    engine_args: dict[str, Any],
    settings: dict[str, Any],
    num_speculative_tokens: int,
) -> list[PlanTable]:
    """Solve on real text of each batch size and context length (tokens per row), in one engine.

    The engine runs in this process, on the device and with the calibration that a server would use.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    engine_args.setdefault("max_model_len", max(contexts) + num_speculative_tokens + 8)
    engine_args.setdefault("max_num_seqs", max(batches))
    # All rows of a batch must be in decode when the solver looks at them: one step for all prompts.
    engine_args.setdefault("max_num_batched_tokens", max(2048, max(batches) * max(contexts)))
    with under_way(f"starting {model}"):
        llm = LLM(
            model=model,
            enable_prefix_caching=False,
            speculative_config={
                "method": "knapspec",
                "num_speculative_tokens": num_speculative_tokens,
                # Nothing is served here: no round is there to be measured.
                "round_overhead_us": 0.0,
                **settings,
            },
            **engine_args,
        )
    engine: Any = llm.llm_engine.engine_core
    try:
        runner = engine.engine_core.model_executor.driver_worker.worker.model_runner
        planning = runner.drafter.planning
        text = reference_tokens(llm, max(contexts) * max(batches))
        tables = []
        for rows in batches:
            for context in contexts:
                planning.request_solve()
                prompts = [
                    {"prompt_token_ids": text[i * context : (i + 1) * context]} for i in range(rows)
                ]
                params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
                with under_way(f"solving for batch {rows}, context {context}"):
                    llm.generate(prompts, params, use_tqdm=False)
                tables.append(_table(planning, rows, context, num_speculative_tokens))
        return tables
    finally:
        engine.shutdown()


def _table(planning: Any, rows: int, context: int, num_speculative_tokens: int) -> PlanTable:
    batch = Batch(rows, rows * context)
    policy = planning.policy
    prices = policy.costs.prices(batch)
    entries = tuple(
        PlanRow(plan, length, alpha, 1.0 - prices.items_us(plan) / prices.target_items_us, speedup)
        for plan, length, alpha, speedup in policy.explain(batch)
    )
    choice = policy.choose(batch, num_speculative_tokens)
    decision = f"declines: {choice.reason}"
    if choice.plan is not None:
        decision = (
            f"{choice.plan.describe()}, draft length {choice.draft_length}, "
            f"predicted {choice.predicted_speedup:.2f}x"
        )
    return PlanTable(rows, context, entries, decision)


def reference_tokens(llm: Any, count: int) -> list[int]:
    """`count` tokens of the Python reference manual, repeated where it is too short."""
    import pydoc_data.topics

    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids: list[int] = llm.get_tokenizer().encode(text)
    return (ids * (-(-count // len(ids))))[:count]


def format_table(table: PlanTable, most: int) -> str:
    """The best `most` plans as text."""
    lines = [
        f"batch {table.rows}, context {table.context} tokens a row: {table.decision}",
        f"  {'speedup':>7} {'draft':>5} {'accept':>6} {'saved':>6}  plan",
    ]
    for row in table.entries[:most]:
        lines.append(
            f"  {row.predicted_speedup:>6.2f}x {row.draft_length:>5} {row.acceptance:>6.2f} "
            f"{row.saving:>6.1%}  {row.plan.to_text()}"
        )
    return "\n".join(lines)


def save_picture(tables: Sequence[PlanTable], path: Path) -> None:
    """Modes of each layer's items in the best plan (drafting or not) over batch and context.

    Raises RuntimeError naming what to install when matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(
            "the picture needs matplotlib: pip install matplotlib, or leave out --picture"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    shown = [table for table in tables if table.entries]
    if not shown:
        raise RuntimeError("there is no plan to draw: the solver found none for these batches")
    layers = shown[0].entries[0].plan.num_layers
    colours = {Mode.FULL: "#e8e8e8", Mode.WINDOW: "#7fb2d9", Mode.SKIP: "#d9534f"}
    labels = [f"{t.rows} x {t.context}" for t in shown]
    figure, axes = plt.subplots(
        1, 2, figsize=(3 + 0.9 * len(shown), 2 + 0.09 * layers), sharey=True, layout="constrained"
    )
    for axis, kind in zip(axes, ("attention", "mlp"), strict=True):
        modes = [
            [int(getattr(t.entries[0].plan, kind)(layer)) for t in shown] for layer in range(layers)
        ]
        axis.imshow(
            modes,
            aspect="auto",
            origin="lower",
            cmap=ListedColormap([colours[mode] for mode in Mode]),
            vmin=0,
            vmax=len(Mode) - 1,
            interpolation="nearest",
        )
        axis.set_title("attention" if kind == "attention" else "MLP")
        axis.set_xticks(range(len(shown)), labels, rotation=60, ha="right", fontsize=8)
        axis.set_xlabel("batch x context")
    axes[0].set_ylabel("layer")
    speedups = ", ".join(f"{t.entries[0].predicted_speedup:.2f}x" for t in shown)
    figure.suptitle(f"best plan per batch and context; predicted {speedups}", fontsize=9)
    figure.legend(
        handles=[Patch(color=colours[mode], label=mode.name) for mode in Mode],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
