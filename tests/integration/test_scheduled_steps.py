# SPDX-License-Identifier: Apache-2.0
"""What vLLM schedules around drafts: its budget of tokens, and prompts in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engines import engine, proposer_of

from knapspec_vllm.bench.checkpoints import random_checkpoint

BUDGET = 32


def prompt(length: int, first: int = 5) -> list[int]:
    return [first + i % 50 for i in range(length)]


def generate(llm: Any, prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in tokens]
    given = [{"prompt_token_ids": ids} for ids in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(given, params, use_tqdm=False)]


@contextmanager
def steps_seen(proposer: Any) -> Iterator[list[tuple[dict[str, int], list[list[int]]]]]:
    """Tokens scheduled by request, and tokens sampled by row, of every step."""
    seen: list[tuple[dict[str, int], list[list[int]]]] = []
    original = proposer.propose_full

    def spy(runner: Any, scheduler_output: Any, sampled_token_ids: Any, **given: Any) -> Any:
        seen.append((dict(scheduler_output.num_scheduled_tokens), list(sampled_token_ids)))
        return original(
            runner,
            scheduler_output=scheduler_output,
            sampled_token_ids=sampled_token_ids,
            **given,
        )

    proposer.propose_full = spy
    try:
        yield seen
    finally:
        del proposer.propose_full


def test_drafts_leave_room_for_every_row() -> None:
    """Eight rows of five drafts are 48 tokens; vLLM would let two of them stand still."""
    model = random_checkpoint("LlamaForCausalLM")
    options = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}
    options["max_num_batched_tokens"] = BUDGET
    prompts, tokens = [prompt(3, 5 + i) for i in range(8)], [30] * 7 + [60]
    with engine(model, **options) as llm:
        expected = generate(llm, prompts, tokens)
    settings = {"plan": "skip mlp:1", "draft_length": 5}
    with engine(model, settings, **options) as llm, steps_seen(proposer_of(llm)) as seen:
        assert generate(llm, prompts, tokens) == expected
    decoding = [scheduled for scheduled, _ in seen[1:] if len(scheduled) == 8]
    assert len(decoding) > 5
    assert max(max(scheduled.values()) for scheduled in decoding) == BUDGET // 16
    # Nobody waits while all eight are there; with fewer of them drafts become longer.
    finished = next(i for i, (scheduled, _) in enumerate(seen[1:], 1) if len(scheduled) < 8)
    assert all(len(scheduled) < 8 for scheduled, _ in seen[finished:])
    assert max(max(scheduled.values()) for scheduled, _ in seen[finished:]) == 6


def test_the_end_of_a_prompt_is_no_plain_step() -> None:
    """Its last chunk and another row's token are a step that all rows get a token of."""
    model = random_checkpoint("LlamaForCausalLM")
    options = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 4}
    options["max_num_batched_tokens"] = BUDGET
    settings = {"plan": "skip mlp:1", "min_speedup": 1e9}
    with engine(model, settings, **options) as llm:
        proposer = proposer_of(llm)
        rests, asked = proposer.planning.rests, []

        def spy(req_ids: Any, steady: bool) -> bool:
            found = rests(req_ids, steady)
            asked.append((steady, found))
            return found

        proposer.planning.rests = spy
        with steps_seen(proposer) as seen:
            generate(llm, [prompt(6), prompt(150)], [40, 40])
    mixed = plain = 0
    for (scheduled, sampled), (steady, rested) in zip(seen, asked, strict=True):
        if all(sampled) and sum(scheduled.values()) > len(scheduled):
            assert not steady
            mixed += len(scheduled) > 1
        plain += rested
    assert mixed == 1
    assert plain > 20
