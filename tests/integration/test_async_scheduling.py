# SPDX-License-Identifier: Apache-2.0
"""`--async-scheduling`: vLLM schedules a step ahead, and drafts start from tokens nobody has seen.

On a CPU steps are queued as on a GPU, and computed at once. Greedy tokens are those of plain vLLM.
With workers in other processes: test_parallel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ahead_on_cpu import schedule_ahead
from engines import (
    LENGTHS,
    assert_same_tokens,
    check_drafted,
    engine,
    greedy,
    metric,
    proposer_of,
    text_prompts,
)
from features import OPTIONS, PLAN, assert_same_answers, run_features

from knapspec_vllm.bench.checkpoints import random_checkpoint

pytestmark = pytest.mark.slow

ENGINE = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 3}
PROMPTS = [[5 + i % 50 for i in range(70)], [9 + i % 31 for i in range(23)], [7, 8, 9, 10]]
FORCED = {"plan": "skip mlp:1; window attn:1", "window_tokens": 16, "sink_tokens": 16}


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule_ahead(monkeypatch.setattr)


def asynchronous(settings: dict[str, Any], **options: Any) -> Any:
    model = random_checkpoint("LlamaForCausalLM")
    return engine(model, settings, async_scheduling=True, **{**ENGINE, **options})


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine(random_checkpoint("LlamaForCausalLM"), **ENGINE) as llm:
        return greedy(llm, PROMPTS, 14)


@pytest.mark.parity
@pytest.mark.parametrize("length", [0, 1, 3])
def test_same_tokens_as_plain_vllm(expected: list[list[int]], length: int) -> None:
    with asynchronous({**FORCED, "draft_length": length}) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        found = greedy(llm, PROMPTS, 14)
        stats = proposer_of(llm).stats
    assert_same_tokens(expected, found)
    assert (stats.draft_tokens > 0) == (length > 0)


#: Accepted often and rejected often.
MIXED = {"plan": "skip attn:4,11,20 mlp:7,8,15; window attn:9,22", "draft_length": 4}
MAX_TOKENS = 12
DRAFTED = "spec_decode_num_draft_tokens"


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    return text_prompts(smollm2_path, tuple(n for n in LENGTHS if n <= 400))


@pytest.fixture(scope="module")
def reference(smollm2_path: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(smollm2_path) as llm:
        return greedy(llm, prompts, MAX_TOKENS)


@pytest.mark.parity
def test_batches_chunks_and_the_prefix_cache(smollm2_path, prompts, reference) -> None:
    """A budget of 96 tokens mixes chunks of prompts with drafting rows."""
    options = {"max_num_batched_tokens": 96, "enable_prefix_caching": True}
    with engine(smollm2_path, MIXED, async_scheduling=True, **options) as llm:
        assert_same_tokens(reference, greedy(llm, prompts, MAX_TOKENS))
        assert_same_tokens(reference[:9], greedy(llm, prompts[:9], MAX_TOKENS, 3))
        assert_same_tokens(reference[-3:], greedy(llm, prompts[-3:], MAX_TOKENS, 1))
        check_drafted(llm)
        assert sum(proposer_of(llm).stats.drafted_by_position) <= metric(llm, DRAFTED)
        # The metric leaves out steps here with vLLM 0.27.
        (again,) = llm.generate([{"prompt_token_ids": prompts[-1]}], use_tqdm=False)
        assert again.num_cached_tokens >= 256


def test_the_planner_decides(smollm2_path, prompts, reference, tmp_path, monkeypatch) -> None:
    """Draft lengths and plans change from step to step, and solves run between them."""
    settings = {
        "always_draft": True,
        "hysteresis": 0.0,
        "store_dir": str(tmp_path),
        "calibration_seconds": 3.0,
    }
    with engine(smollm2_path, settings, async_scheduling=True) as llm:
        proposer = proposer_of(llm)
        decided, choose = set(), proposer.planning.choose

        def spy(*args: Any) -> Any:
            choice = choose(*args)
            decided.add((choice.plan, choice.draft_length))
            return choice

        monkeypatch.setattr(proposer.planning, "choose", spy)
        for batch in (8, 3, 1):
            proposer.planning.request_solve()
            assert_same_tokens(reference, greedy(llm, prompts, MAX_TOKENS, batch))
        check_drafted(llm)
        assert sum(proposer_of(llm).stats.drafted_by_position) <= metric(llm, DRAFTED)
        stats = proposer.snapshot()["stats"]
    assert stats["solves"] >= 3
    assert 0 < stats["measured_solve_us"] < sum(stats["phase_us"].values())
    # Plans that drafted, and their lengths.
    assert len({plan for plan, _ in decided if plan}) > 1
    assert len(decided) > 3
    # Rounds were timed, and held against what was predicted of them.
    assert stats["measured_rounds"] > 20
    assert min(stats["phase_us"]["step"], stats["phase_us"]["draft"]) > 0
    assert 0.2 < stats["realised_round_us"] / stats["predicted_round_us"] < 5


@pytest.mark.parity
def test_preemption(smollm2_path, prompts, reference) -> None:
    few = [i for i, ids in enumerate(prompts) if 100 <= len(ids) <= 257]
    options = {"num_gpu_blocks_override": 12, "max_model_len": 1024, "block_size": 128}
    with engine(smollm2_path, MIXED, async_scheduling=True, **options) as llm:
        got = greedy(llm, [prompts[i] for i in few], MAX_TOKENS)
        assert_same_tokens([reference[i] for i in few], got)
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("whole", [False, True])
def test_rows_reach_max_model_len(smollm2_path, prompts, whole, monkeypatch) -> None:
    few = [ids for ids in prompts if 40 <= len(ids) <= 128]
    with engine(smollm2_path, max_model_len=144) as llm:
        expected = greedy(llm, few, 60)
    with engine(smollm2_path, MIXED, async_scheduling=True, max_model_len=144) as llm:
        if whole:
            captured(proposer_of(llm), monkeypatch)
        assert_same_tokens(expected, greedy(llm, few, 60))
        assert proposer_of(llm).stats.clipped_rows["max_model_len"] > 0


@pytest.fixture(scope="module")
def featured(smollm2_path: Path) -> list:
    with engine(smollm2_path, **OPTIONS) as llm:
        return run_features(llm, smollm2_path)


@pytest.mark.parity
@pytest.mark.parametrize("whole", [False, True])
def test_features_of_requests(
    whole: bool, featured: list, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grammars, penalties, stop strings and log-probabilities.

    Each in an engine of its own: vLLM 0.27 leaves the `allowed_token_ids` of a row that moved where
    they were, and a later request there is bound by them (its ngram drafter shows the same).
    """
    with engine(smollm2_path, PLAN, async_scheduling=True, **OPTIONS) as llm:
        proposer = proposer_of(llm)
        beyond = captured(proposer, monkeypatch) if whole else []
        assert_same_answers(featured, run_features(llm, smollm2_path))
    assert proposer.stats.accepted_tokens > 0
    assert bool(beyond) == (proposer.stats.verify_steps["whole"] > 0) == whole


def answers(llm: Any, lengths: list[int], wanted: list[Any]) -> list[list[int]]:
    """Greedy answers to the prompts of so many tokens; wanted: what each request asks for."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=n, ignore_eos=True, detokenize=False, extra_args=asked
        )
        for n, asked in zip(lengths, wanted, strict=True)
    ]
    requests = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


#: Whole verify steps "captured" for every draft length up to 4: padded, and run once more.
CAPTURED = {tokens: tuple(range(1, 10)) for tokens in (2, 3, 4, 5)}


@pytest.mark.parity
def test_rows_about_to_end_keep_the_others_steps_whole(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where whole verify steps are captured: what is drafted beyond an end is dropped."""
    lengths = [5, 8, 14]
    expected = [ids[:n] for ids, n in zip(expected, lengths, strict=True)]
    with asynchronous({**FORCED, "draft_length": 3}) as llm:
        proposer = proposer_of(llm)
        assert_same_tokens(expected, answers(llm, lengths, [None] * 3))
        assert not proposer.stats.verify_steps
        beyond = captured(proposer, monkeypatch)
        assert_same_tokens(expected, answers(llm, lengths, [None] * 3))
    assert beyond
    assert proposer.stats.verify_steps["pieces"] == 0 < proposer.stats.verify_steps["whole"]


def captured(proposer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on verify steps are captured; grows by a token count for each row that drafts
    beyond its end."""
    graphs, beyond = proposer.verify_graphs, []
    lengths_of = graphs.lengths

    def spy(rows: Any, draft_length: int) -> list[int]:
        lengths = lengths_of(rows, draft_length)
        pairs = zip(lengths, rows.limits, strict=True)
        beyond.extend(length - limit for length, limit in pairs if length > limit)
        return lengths

    monkeypatch.setattr(graphs, "_rows", CAPTURED)
    monkeypatch.setattr(graphs, "lengths", spy)
    return beyond


@pytest.mark.parametrize("whole", [False, True])
def test_draft_lengths_of_requests(
    whole: bool, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row wants no drafts, one at most one token, and the others' are as long as ever."""
    wanted = [None if n is None else {"knapspec_draft_length": n} for n in (0, 1, None)]
    with asynchronous({**FORCED, "draft_length": 3}) as llm:
        if whole:
            captured(proposer_of(llm), monkeypatch)
        found = answers(llm, [14, 14, 14], wanted)
        drafted = metric(llm, DRAFTED)
        drafts = metric(llm, "spec_decode_num_drafts")
        stats = proposer_of(llm).stats
    assert_same_tokens(expected, found)
    assert stats.drafted_by_position[0] > stats.drafted_by_position[1] > 0
    assert 1 < drafted / drafts < 3


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (
            {"debug_invariants": True},
            {},
            "needs debug_invariants, confidence_threshold, strategy unset",
        ),
        ({"confidence_threshold": 0.5}, {}, "needs debug_invariants, confidence_threshold"),
        ({"strategy": "clasp"}, {}, "needs debug_invariants, confidence_threshold, strategy"),
        (
            {},
            {"distributed_executor_backend": "external_launcher"},
            "needs workers that are vLLM's",
        ),
    ],
)
def test_what_cannot_be(settings: dict, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words), asynchronous(settings, **options):
        pass
