# SPDX-License-Identifier: Apache-2.0
"""Each combination that cannot work is refused at config time by a sentence naming the setting."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knapspec_vllm import refusals
from knapspec_vllm.patches import apply
from knapspec_vllm.plugin import register

pytest.importorskip("vllm")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


def build(model: str, speculative: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """The engine config a server would build."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"skip_tokenizer_init": True, "max_model_len": 128} | arguments
    speculative = {"method": "knapspec"} | (speculative or {})
    return EngineArgs(
        model=model, speculative_config=speculative, **arguments
    ).create_engine_config()


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    apply.restore_all()
    register()
    yield
    apply.restore_all()


class Overlay:
    """A real config with some fields changed: what vLLM would not let us build on this machine."""

    def __init__(self, base: Any, **changes: Any) -> None:
        self.__dict__.update(changes)
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def overlaid(config: Any, path: str, value: Any) -> Any:
    first, _, rest = path.partition(".")
    below = overlaid(getattr(config, first, None), rest, value) if rest else value
    return Overlay(config, **{first: below})


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return build(write_model(tmp_path))


def test_a_plain_config_is_admitted(config: Any) -> None:
    assert refusals.found(config) == []
    refusals.check_before(config)
    refusals.check(config)


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("device_config.device_type", "tpu", "device 'tpu'"),
        ("use_v2_model_runner", True, "model runner V2"),
        ("scheduler_config.async_scheduling", True, "needs a GPU"),
        ("speculative_config.num_speculative_tokens", 0, "num_speculative_tokens is 0"),
        ("speculative_config.num_speculative_tokens", 33, "write 1 to 32"),
        ("speculative_config.parallel_drafting", True, "'parallel_drafting'"),
        ("speculative_config.disable_padded_drafter_batch", True, "'disable_padded_drafter_batch'"),
        (
            "speculative_config.num_speculative_tokens_per_batch_size",
            [[1, 16, 4]],
            "'num_speculative_tokens_per_batch_size'",
        ),
        ("speculative_config.rejection_sample_method", "synthetic", "rejection_sample_method"),
        ("speculative_config.draft_sample_method", "probabilistic", "draft_sample_method"),
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size is 2"),
        ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size is 2"),
        ("parallel_config.prefill_context_parallel_size", 4, "--prefill-context-parallel-size"),
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("model_config.enable_prompt_embeds", True, "--enable-prompt-embeds"),
        ("parallel_config.ubatch_size", 2, "--ubatch-size"),
        ("parallel_config.enable_expert_parallel", True, "--enable-expert-parallel"),
        ("parallel_config.enable_eplb", True, "--enable-eplb"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder"),
        ("model_config.runner_type", "pooling", "--runner pooling"),
        ("model_config.is_multimodal_model", True, "multimodal"),
        ("model_config.uses_mrope", True, "M-RoPE"),
        ("model_config.is_hybrid", True, "hybrid"),
        ("model_config.has_inner_state", True, "state-space"),
        ("model_config.use_mla", True, "MLA"),
        ("model_config.is_moe", True, "mixture-of-experts"),
        ("model_config.architecture", "GemmaForCausalLM", "supported are LlamaForCausalLM"),
        ("model_config.hf_text_config.sliding_window", 64, "--disable-sliding-window"),
        ("model_config.hf_text_config.attention_chunk_size", 64, "attention_chunk_size"),
        ("lora_config", object(), "--enable-lora"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
        ("ec_transfer_config", object(), "--ec-transfer-config"),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
    ],
)
def test_refused(config: Any, path: str, value: Any, words: str) -> None:
    changed = overlaid(config, path, value)
    sentences = refusals.found(changed)
    assert any(words in sentence for sentence in sentences), sentences
    with pytest.raises(ValueError, match=r"^KnapSpec: "):
        refusals.check(changed)


def test_every_rule_has_been_seen_refusing() -> None:
    """One row of the table above per rule, besides the three that need other input."""
    (marker,) = (m for m in test_refused.pytestmark if m.name == "parametrize")
    paths = {row[0] for row in marker.args[1]}
    assert len(paths) >= len(refusals.AFTER) - 2  # all but `plan` and `strategy`


def test_published_planners_are_refused_on_several_ranks(tmp_path: Path) -> None:
    config = build(write_model(tmp_path), {"strategy": "swift"})
    assert refusals.found(config) == []
    changed = overlaid(config, "parallel_config.tensor_parallel_size", 2)
    (sentence,) = refusals.found(changed)
    assert "strategy 'swift'" in sentence
    assert "--tensor-parallel-size is 2" in sentence


@pytest.mark.parametrize(
    "speculative, arguments, words",
    [
        ({}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2"),
        ({}, {"enable_lora": True}, "--enable-lora"),
        ({}, {"async_scheduling": True}, "--async-scheduling needs a GPU with it"),
        ({}, {"runner": "pooling"}, "--runner pooling"),
        ({"num_speculative_tokens": 40}, {}, "num_speculative_tokens is 40; write 1 to 32"),
        ({"num_speculative_tokens": 4, "draft_length": 5}, {}, "raise num_speculative_tokens"),
        ({"plan": "skip attn:9"}, {}, "setting 'plan' cannot be used with this model of 4 layers"),
        ({}, {"additional_config": {"knapspec": {"bin": 3}}}, "did you mean 'bins'?"),
        ({"rejection_sample_method": "block"}, {}, "write 'standard'"),
    ],
)
def test_refused_when_the_engine_config_is_built(
    tmp_path: Path, speculative: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        build(write_model(tmp_path), speculative, **arguments)
    assert words in str(caught.value)


def test_unsupported_architecture_is_refused_when_the_engine_config_is_built(
    tmp_path: Path,
) -> None:
    model = write_model(tmp_path, architectures=["Starcoder2ForCausalLM"], model_type="starcoder2")
    with pytest.raises(ValueError, match="Starcoder2ForCausalLM is not supported"):
        build(model)


def test_explicit_v2_runner(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        refusals.check_before(config)


def test_several_refusals_are_all_said(config: Any) -> None:
    changed = overlaid(overlaid(config, "lora_config", object()), "kv_transfer_config", object())
    with pytest.raises(ValueError, match="KnapSpec") as caught:
        refusals.check(changed)
    assert len(str(caught.value).splitlines()) == 2


def test_mixed_layer_types(config: Any) -> None:
    text = Overlay(
        config.model_config.hf_text_config,
        sliding_window=64,
        layer_types=["full_attention", "sliding_attention"],
    )
    mixed = overlaid(config, "model_config.hf_text_config", text)
    assert "--disable-sliding-window" in refusals.found(mixed)[0]
    text.layer_types = ["full_attention"] * 4
    assert refusals.found(mixed) == []


def test_a_view_of_a_checked_config_is_not_checked_again(config: Any) -> None:
    view = overlaid(config, "model_config.is_submodel_config", True)
    view.lora_config = object()
    refusals.check(view)
