# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, and that vLLM refuses the rest before it is admitted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from knapspec_vllm.request_options import admitted_limit, check, draft_limit


@pytest.mark.parametrize(
    ("given", "limit"),
    [(None, None), ({}, None), ({"other": 1}, None), ({"knapspec_draft_length": 0}, 0),
     ({"knapspec_draft_length": 3}, 3), ({"knapspec_draft_length": 2.0}, 2),
     ({"knapspec_draft_length": "4"}, 4)],
)  # fmt: skip
def test_limits(given: dict | None, limit: int | None) -> None:
    assert draft_limit(given) == limit
    check(given)


@pytest.mark.parametrize("value", [-1, 1.5, "few", True, None, [1], float("inf"), float("nan")])
def test_refused_values(value: object) -> None:
    with pytest.raises(ValueError, match=r"knapspec_draft_length'] is .*; write a whole number"):
        check({"knapspec_draft_length": value})


def test_what_was_not_refused_at_admission_does_not_draft(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a worker an error would end the server for everybody."""
    assert admitted_limit({"knapspec_draft_length": 3}) == 3
    assert admitted_limit({}) is None
    for _ in range(3):
        assert admitted_limit({"knapspec_draft_length": "many"}) == 0
    assert caplog.text.count("served without speculation") == 1


@pytest.mark.parametrize("key", ["max_length", "draft_length", "output_length", "top_n", 7])
def test_keys_of_others_are_theirs(key: object) -> None:
    check({key: 3})  # type: ignore[dict-item]


@pytest.mark.parametrize("key", ["knapspec_draft_lenght", "knapspec", "knapspec_length"])
def test_near_misses_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}'; did you mean 'knapspec_draft_length'"):
        check({key: 0})


def test_vllm_refuses_it_only_where_knapspec_drafts() -> None:
    from vllm import SamplingParams
    from vllm.config import ModelConfig
    from vllm.exceptions import VLLMValidationError

    from knapspec_vllm.bench.checkpoints import random_checkpoint
    from knapspec_vllm.patches.selection import PROPOSER_PATH
    from knapspec_vllm.plugin import register

    register()
    model = ModelConfig(str(random_checkpoint("LlamaForCausalLM")), skip_tokenizer_init=True)
    params = SamplingParams(extra_args={"knapspec_draft_length": -2})
    ours = SimpleNamespace(method="custom_class", model=PROPOSER_PATH)
    with pytest.raises(VLLMValidationError, match="knapspec_draft_length"):
        params.verify(model, ours, None, None)
    params.verify(model, None, None, None)
    params.verify(model, SimpleNamespace(method="ngram", model=None), None, None)
    SamplingParams(extra_args={"knapspec_draft_length": 2}).verify(model, ours, None, None)
