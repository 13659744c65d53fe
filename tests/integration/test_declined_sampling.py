# SPDX-License-Identifier: Apache-2.0
"""A step that drafts nothing samples with vLLM's plain sampler: same seed, same answer."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from engines import engine, proposer_of, text_prompts

from knapspec_vllm.bench.checkpoints import random_checkpoint

PROMPTS = [[5 + (7 * i + j) % 50 for j in range(12)] for i in range(4)]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 4}

pytestmark = pytest.mark.parity


def sampled(llm) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Tokens and log-probabilities of sampled, filtered and greedy requests in one batch."""
    from vllm import SamplingParams

    kinds = [
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 7},
        {"temperature": 0.9, "top_p": 0.7, "presence_penalty": 0.5},
        {"temperature": 0.0},
    ]
    params = [
        SamplingParams(**kind, seed=number, max_tokens=12, logprobs=3, ignore_eos=True)
        for number, kind in enumerate(kinds)
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        (list(answer.token_ids), [{t: p.logprob for t, p in at.items()} for at in answer.logprobs])
        for answer in answers
    ]


def every_step_may_reject() -> bool:
    """vLLM 0.27 asks for metadata, and its rejection sampler, where something is drafted; later
    releases in every step."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._prepare_inputs)
    return "use_spec_decode = self.speculative_config is not None" in source


def test_declined_steps_sample_as_plain_vllm(monkeypatch) -> None:
    model = random_checkpoint("LlamaForCausalLM")
    with engine(model, **OPTIONS) as llm:
        expected = sampled(llm)
    with engine(model, {"draft_length": 0}, **OPTIONS) as llm:
        from vllm.v1.sample import rejection_sampler
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        def drawn(*args):
            raise AssertionError("the rejection sampler has nothing to reject")

        ours, compared = GPUModelRunner._calc_spec_decode_metadata, []

        def both(self, *args):
            found, theirs = ours(self, *args), ours.__wrapped__(self, *args)
            for field in dataclasses.fields(theirs):
                mine, want = getattr(found, field.name), getattr(theirs, field.name)
                assert torch.equal(torch.as_tensor(mine), torch.as_tensor(want)), field.name
                assert torch.as_tensor(mine).dtype == torch.as_tensor(want).dtype, field.name
            compared.append(len(theirs.num_draft_tokens))
            return found

        # Nothing is drafted, so nothing was priced.
        assert proposer_of(llm).calibration["source"] == "none"
        with monkeypatch.context() as patch:
            patch.setattr(rejection_sampler, "rejection_sample", drawn)
            patch.setattr(GPUModelRunner, "_calc_spec_decode_metadata", both)
            found = sampled(llm)
        assert max(compared, default=0) == (len(PROMPTS) if every_step_may_reject() else 0)
    for (tokens, logprobs), (want_tokens, want) in zip(found, expected, strict=True):
        assert tokens == want_tokens
        assert len(logprobs) == len(want) == 12
        for step, want_step in zip(logprobs, want, strict=True):
            assert step == pytest.approx(want_step, abs=1e-5)


def test_a_thinking_budget_ends_its_own_row(smollm2_path: Path) -> None:
    """And no other row of a step without drafts."""
    from vllm import SamplingParams
    from vllm.config.reasoning import ReasoningConfig

    if not every_step_may_reject():
        pytest.skip("this vLLM samples such steps itself, and forces row 0 with any speculation")
    begins, ends = 14, 16  # <jupyter_output> and <empty_output>, which this model never writes
    prompts = [
        {"prompt_token_ids": [begins, *prompt]} for prompt in text_prompts(smollm2_path, (20,) * 3)
    ]
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    params = [
        SamplingParams(**greedy, **({"thinking_token_budget": budget} if budget else {}))
        for budget in (None, 26, 23)  # the prompt's tokens count
    ]
    answers = []
    for settings in (None, {"draft_length": 0}):
        config = ReasoningConfig(
            reasoning_start_str="<jupyter_output>", reasoning_end_str="<empty_output>"
        )
        options = {"max_model_len": 64, "max_num_seqs": 4, "reasoning_config": config}
        with engine(smollm2_path, settings, **options) as llm:
            found = llm.generate(prompts, params, use_tqdm=False)
        answers.append([list(output.outputs[0].token_ids) for output in found])
    plain, declined = answers
    assert [ends in answer for answer in plain] == [False, True, True]
    assert declined == plain


def test_drafted_steps_still_reject() -> None:
    model = random_checkpoint("LlamaForCausalLM")
    settings = {"plan": "skip attn:* mlp:0", "draft_length": 2}
    with engine(model, settings, num_speculative_tokens=2, **OPTIONS) as llm:
        found = sampled(llm)
    assert [len(tokens) for tokens, _ in found] == [12] * 4
    assert [len(logprobs) for _, logprobs in found] == [12] * 4
