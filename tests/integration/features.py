# SPDX-License-Identifier: Apache-2.0
"""Requests that differ in everything a request can ask for, all in one batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engines import text_prompts

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


#: Of the engines: room for all of the requests at once.
OPTIONS = {"max_model_len": 512, "max_num_seqs": 9}
#: Drafts some of which are accepted.
PLAN = {"plan": "skip attn:6,7 mlp:9,17", "draft_length": 4}


def requests(model: Path) -> list[tuple[dict, dict]]:
    """(prompt, keyword arguments of SamplingParams) of each request."""
    texts = [{"prompt_token_ids": ids} for ids in text_prompts(model, (30, 60, 90, 129, 40, 20))]
    form = {"prompt": "A person, as JSON: "}
    return [
        (form, {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60}),
        (texts[0], {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}),
        (texts[1], {"logprobs": 3}),
        (texts[2], {"bad_words": [" the", " a", "."], "min_tokens": 20}),
        (texts[3], {"allowed_token_ids": list(range(100, 900))}),
        (texts[4], {"stop": ["e", "."], "max_tokens": 40}),
        (texts[5], {"max_tokens": 1}),
        (texts[5], {"prompt_logprobs": 2, "max_tokens": 10}),
        (form, {"structured_outputs": {"json": SCHEMA}, "max_tokens": 7}),  # ends inside of it
    ]


def run_features(llm: Any, model: Path) -> list:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    prompts, params = [], []
    for prompt, settings in requests(model):
        settings = {"temperature": 0, "max_tokens": 30, **settings}
        if "structured_outputs" in settings:
            settings["structured_outputs"] = StructuredOutputsParams(
                **settings["structured_outputs"]
            )
        prompts.append(prompt)
        params.append(SamplingParams(**settings))
    return llm.generate(prompts, params, use_tqdm=False)


def assert_same_answers(expected: list, got: list) -> None:
    """Texts, tokens and reasons to finish are equal, log-probabilities nearly."""
    for i, (want, have) in enumerate(zip(expected, got, strict=True)):
        assert want.outputs[0].text == have.outputs[0].text, i
        assert want.outputs[0].token_ids == have.outputs[0].token_ids, i
        assert want.outputs[0].finish_reason == have.outputs[0].finish_reason, i
    person = json.loads(got[0].outputs[0].text)
    assert set(person) == {"name", "age"}
    check_logprobs(expected[2].outputs[0].logprobs, got[2].outputs[0].logprobs)
    check_logprobs(expected[7].prompt_logprobs[1:], got[7].prompt_logprobs[1:])


def check_logprobs(expected: list[dict], got: list[dict]) -> None:
    assert len(expected) == len(got)
    for want, have in zip(expected, got, strict=True):
        assert set(want) == set(have)
        for token, value in want.items():
            assert math.isclose(value.logprob, have[token].logprob, abs_tol=2e-3)
