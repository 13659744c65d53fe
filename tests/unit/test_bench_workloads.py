# SPDX-License-Identifier: Apache-2.0
"""Prompts have exact lengths, differ from row to row, and repeat from run to run."""

from __future__ import annotations

import pytest

from knapspec_vllm.bench.arms import UsageError
from knapspec_vllm.bench.workloads import QUESTIONS, WORKLOADS, Workload, chat_parts
from tests.helpers_bench import FakeTokenizer


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("length", [96, 3000])
def test_lengths_are_exact_and_rows_differ(name: str, length: int) -> None:
    prompts = Workload(name, FakeTokenizer()).prompts(12, length)
    assert [len(prompt) for prompt in prompts] == [length] * 12
    assert len({tuple(prompt) for prompt in prompts}) == 12
    assert len({tuple(prompt[-40:]) for prompt in prompts}) > 9, "not the same text shifted"


def test_prompts_repeat_and_series_differ() -> None:
    first, second = (Workload("mixed", FakeTokenizer()) for _ in range(2))
    assert first.prompts(5, 200, "cell 0") == second.prompts(5, 200, "cell 0")
    assert first.prompts(2, 200, "cell 0") == first.prompts(5, 200, "cell 0")[:2]
    fresh, known = first.prompts(5, 200, "cell 1"), first.prompts(5, 200, "cell 0")
    assert not {tuple(p) for p in fresh} & {tuple(p) for p in known}


def test_mixed_rows_alternate() -> None:
    tokenizer = FakeTokenizer()
    mixed = Workload("mixed", tokenizer).prompts(6, 300)
    for row, kind in enumerate(["docs", "code", "chat"] * 2):
        assert mixed[row] == Workload(kind, tokenizer).prompts(6, 300)[row]


def test_a_text_opens_as_the_tokenizer_opens_it() -> None:
    assert Workload("docs", FakeTokenizer()).prompts(1, 50)[0][0] == 1


@pytest.mark.parametrize("template", ["user and assistant", None])
def test_chat_keeps_the_template_around_the_passage(template: str | None) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = template
    head, tail = chat_parts(tokenizer, QUESTIONS[0])
    expected = (
        [1, *tokenizer(f"Question: {QUESTIONS[0]}\nAnswer:", False)["input_ids"]]
        if template is None
        else tokenizer(f"<user>{QUESTIONS[0]}</user><assistant>", False)["input_ids"]
    )
    assert head + tail == expected
    for prompt in Workload("chat", tokenizer).prompts(8, 400):
        assert prompt[: len(head)] == head
        assert prompt[-1] == tail[-1]


def test_too_short_a_context_names_the_option() -> None:
    with pytest.raises(UsageError, match="--context 12 is too short"):
        Workload("chat", FakeTokenizer()).prompts(2, 12)
    with pytest.raises(UsageError, match="--workload novels"):
        Workload("novels", FakeTokenizer())
