# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines in this process, prompts of real text, and greedy runs over them."""

from __future__ import annotations

import gc
import pydoc_data.topics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from knapspec_vllm.planner.types import Plan

#: Chat-length to document-length prompts, in tokens: block boundaries (128 is the CPU block size),
#: one past them, and one of 5,000.
LENGTHS = (
    10, 11, 13, 17, 23, 31, 32, 33, 40, 47, 50, 61, 64, 65, 77, 90, 100, 111, 120, 126, 127, 128,
    129, 140, 150, 161, 180, 200, 230, 255, 256, 257, 300, 340, 383, 400, 512, 640, 1500, 5000,
)  # fmt: skip


@contextmanager
def engine(model: Path, knapspec: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """An eager float32 `vllm.LLM`; with `knapspec` settings it drafts, without it is plain vLLM."""
    from vllm import LLM

    if knapspec is not None:
        tokens = settings.pop("num_speculative_tokens", 5)
        settings["speculative_config"] = {
            "method": "knapspec",
            "num_speculative_tokens": tokens,
            **knapspec,
        }
        settings.setdefault("async_scheduling", False)  # the default of a GPU has its own tests
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 6144,
        "max_num_seqs": 8,
        "disable_log_stats": False,
        # The models are small, and a GPU may have other work.
        **({"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {}),
        **settings,
    }
    llm = LLM(model=str(model), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def proposer_of(llm: Any) -> Any:
    """The KnapSpecProposer of an in-process engine."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.drafter


def force(llm: Any, plan: Plan | str, draft_length: int) -> None:
    """Draft `draft_length` tokens with `plan` from now on."""
    planning = proposer_of(llm).planning
    if isinstance(plan, str):
        plan = Plan.parse(plan, proposer_of(llm).engine.view.num_layers)
    planning.force(plan, draft_length)


def text_prompts(model: Path, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """One prompt of each length from the Python reference manual, which every Python ships."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    ids: list[int] = tokenizer("\n\n".join(topics))["input_ids"]
    step = len(ids) // len(lengths)
    return [ids[i * step : i * step + length] for i, length in enumerate(lengths)]


def greedy(
    llm: Any, prompts: list[list[int]], max_tokens: int, batch: int | None = None
) -> list[list[int]]:
    """Greedy token ids, `batch` requests at a time (None: all at once, the scheduler decides)."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    step = batch or len(prompts)
    outputs = []
    for at in range(0, len(prompts), step):
        requests = [{"prompt_token_ids": ids} for ids in prompts[at : at + step]]
        outputs.extend(llm.generate(requests, params, use_tqdm=False))
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm: Any, name: str) -> float:
    """Value of one of the engine's own Prometheus metrics, 0 if it has not been counted yet."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def check_drafted(llm: Any) -> None:
    """Drafts were really verified, some accepted and some rejected, and all counts agree."""
    stats = proposer_of(llm).stats
    drafted = metric(llm, "spec_decode_num_draft_tokens")
    accepted = metric(llm, "spec_decode_num_accepted_tokens")
    assert 0 < accepted < drafted
    # vLLM counts what it schedules: all our drafts but those of preempted or finished requests, and
    # placeholders of its own.
    assert drafted <= stats.draft_tokens + stats.placeholder_tokens
    assert 0 <= accepted - stats.accepted_tokens <= stats.placeholder_tokens


def assert_same_tokens(expected: list[list[int]], got: list[list[int]]) -> None:
    """Token-for-token equality; names the first request and position that differ."""
    assert len(expected) == len(got)
    for i, (want, have) in enumerate(zip(expected, got, strict=True)):
        if want != have:
            at = next((j for j, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), -1)
            raise AssertionError(
                f"request {i} differs at output token {at}: {want[at : at + 5]} became "
                f"{have[at : at + 5]} (lengths {len(want)} and {len(have)})"
            )


@torch.inference_mode()
def output_states(llm: Any, prompts: list[list[int]], tokens: int) -> torch.Tensor:
    """[T, d]: what vLLM hands to the model's head while it answers them, without drafts."""
    view = proposer_of(llm).engine.view
    compute_logits, seen = view.target.compute_logits, []

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.clone())
        return compute_logits(hidden)

    view.target.compute_logits = noted
    try:
        force(llm, "skip mlp:1", 0)
        greedy(llm, prompts, tokens)
    finally:
        view.target.compute_logits = compute_logits
    return torch.cat(seen)
