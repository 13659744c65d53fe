# SPDX-License-Identifier: Apache-2.0
"""What cannot work together with KnapSpec: refused at config time, before weights load.

Every rule is pure and reads a VllmConfig through `getattr`, since vLLM validates configs more than
once and fields come and go between versions. A rule returns None or one sentence that names the
setting and says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from knapspec_vllm.config import KnapSpecConfig

ASYNC_DEVICES = ("cuda",)  # vLLM schedules nothing ahead on a CPU
ASYNC_EXECUTORS = (None, "uni", "mp")

Rule = Callable[[Any, KnapSpecConfig], str | None]

#: SpeculativeConfig fields of methods with a draft model; the values are what "unset" looks like.
_DRAFT_MODEL_FIELDS: dict[str, Any] = {
    "draft_tensor_parallel_size": None,
    "quantization": None,
    "moe_backend": None,
    "attention_backend": None,
    "kv_cache_dtype": None,
    "max_model_len": None,
    "draft_load_config": None,
    "num_speculative_tokens_per_batch_size": None,
    "disable_padded_drafter_batch": False,
    "use_heterogeneous_vocab": False,
    "parallel_drafting": False,
    "enable_adaptive_verification": False,
}


def check_before(vllm_config: Any) -> None:
    """Rules on what the user wrote, before vLLM resolves it. Raises ValueError."""
    _raise(found(vllm_config, BEFORE))


def check(vllm_config: Any) -> None:
    """Rules on the resolved config. Raises ValueError with one sentence per refusal."""
    _raise(found(vllm_config, AFTER))


def found(vllm_config: Any, rules: tuple[Rule, ...] | None = None) -> list[str]:
    """One sentence per refusal, in the order of the rules. Raises on bad KnapSpec settings."""
    model = getattr(vllm_config, "model_config", None)
    if getattr(model, "is_submodel_config", False):  # a view of a config already checked
        return []
    settings = KnapSpecConfig.from_vllm_config(vllm_config)
    results = (rule(vllm_config, settings) for rule in rules or (*BEFORE, *AFTER))
    return [sentence for sentence in results if sentence is not None]


def _raise(sentences: list[str]) -> None:
    if sentences:
        raise ValueError("\n".join(f"KnapSpec: {sentence}" for sentence in sentences))


def _get(config: Any, path: str, default: Any = None) -> Any:
    """``_get(c, "a.b")`` is c.a.b, or `default` where this vLLM has no such field."""
    for name in path.split("."):
        config = getattr(config, name, None)
        if config is None:
            return default
    return config


def _flag(path: str, sentence: str) -> Rule:
    """Refuse when the field at `path` is set (not None, False or 0)."""

    def rule(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
        return sentence if _get(vllm_config, path) else None

    return rule


def _above_one(path: str, sentence: str) -> Rule:
    """Refuse when the number at `path` exceeds 1; ``{}`` in the sentence is that number."""

    def rule(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
        value = _get(vllm_config, path, 1)
        return sentence.format(value) if value > 1 else None

    return rule


def asynchronous_needs(vllm_config: Any) -> str | None:
    """What is missing for asynchronous scheduling; None where KnapSpec can draft under it."""
    settings = KnapSpecConfig.from_vllm_config(vllm_config)
    own = {"debug_invariants": False, "confidence_threshold": 0, "strategy": "knapspec"}
    if _get(vllm_config, "device_config.device_type") not in ASYNC_DEVICES:
        return "a GPU"
    if _get(vllm_config, "parallel_config.distributed_executor_backend") not in ASYNC_EXECUTORS:
        return "workers that are vLLM's own processes (--distributed-executor-backend mp or uni)"
    if _get(vllm_config, "parallel_config.data_parallel_size", 1) > 1:
        return "one engine (no data parallel)"
    if _get(vllm_config, "scheduler_config.scheduler_cls") is not None:
        return "vLLM's own scheduler (--scheduler-cls unset)"
    if any(getattr(settings, name) != value for name, value in own.items()):
        return f"{', '.join(own)} unset"
    return None


def _asynchronous(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    if _get(vllm_config, "scheduler_config.async_scheduling") is not True:
        return None
    needed = asynchronous_needs(vllm_config)
    return needed and f"--async-scheduling needs {needed} with it; or write --no-async-scheduling."


def _explicit_v2(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "").strip() == "1":
        return "VLLM_USE_V2_MODEL_RUNNER=1 asks for a model runner it does not support; unset it."
    return None


def _resolved_v2(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    if getattr(vllm_config, "use_v2_model_runner", False):
        return (
            "another setting (such as watermarking or HiSparse) forces model runner V2, which it "
            "does not support yet; remove that setting."
        )
    return None


def _token_count(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    return settings.refuses(_get(vllm_config, "speculative_config.num_speculative_tokens", 0))


def _draft_model_keys(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    speculative = vllm_config.speculative_config
    for name, unset in _DRAFT_MODEL_FIELDS.items():
        if getattr(speculative, name, unset) != unset:
            return (
                f"speculative-config key '{name}' has no meaning with it: it drafts with the "
                "served model itself and chooses the draft length per batch; remove the key."
            )
    return None


def _sampling_methods(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    for name, only in (("rejection_sample_method", "standard"), ("draft_sample_method", "greedy")):
        value = _get(vllm_config, f"speculative_config.{name}", only)
        if value != only:
            return f"{name} '{value}' is not supported; remove it or write '{only}'."
    return None


def _plan(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    if settings.plan == "auto" or _get(vllm_config, "model_config") is None:
        return None
    from knapspec_vllm.planner.types import Plan

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    try:
        Plan.parse(settings.plan, layers)
    except ValueError as error:
        return f"setting 'plan' cannot be used with this model of {layers} layers: {error}"
    return None


def _strategy(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    ranks = _get(vllm_config, "parallel_config.tensor_parallel_size", 1)
    if settings.strategy == "knapspec" or ranks == 1:
        return None
    return (
        f"strategy '{settings.strategy}' searches on every rank by itself, and "
        f"--tensor-parallel-size is {ranks}; remove the setting or write 'knapspec'."
    )


def _architecture(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    from knapspec_vllm.models import SUPPORTED_ARCHITECTURES

    name = _get(vllm_config, "model_config.architecture")
    if name is None or name in SUPPORTED_ARCHITECTURES:
        return None
    return (
        f"the model's architecture {name} is not supported; supported are "
        f"{', '.join(SUPPORTED_ARCHITECTURES)}."
    )


def _sliding_window(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    text = _get(vllm_config, "model_config.hf_text_config")
    layer_types = getattr(text, "layer_types", None) or ()
    if getattr(text, "sliding_window", None) and (
        not layer_types or "sliding_attention" in layer_types
    ):
        return (
            "the model's sliding-window attention frees KV blocks a draft would read; "
            "write --disable-sliding-window if the window's length is enough context."
        )
    return None


def _chunked_attention(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    text = _get(vllm_config, "model_config.hf_text_config")
    names = (n for n in ("dual_chunk_attention_config", "attention_chunk_size") if _get(text, n))
    found = next(names, None)
    return found and f"the model's {found} is not supported; serve it without KnapSpec."


def _pooling(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    if _get(vllm_config, "model_config.runner_type", "generate") != "generate":
        return "--runner pooling generates no tokens to draft; remove --speculative-config."
    return None


def _platform(vllm_config: Any, settings: KnapSpecConfig) -> str | None:
    device = str(_get(vllm_config, "device_config.device_type", "cpu"))
    known = device in ("cpu", "cuda")  # ROCm calls itself cuda
    return None if known else f"device '{device}' is not supported; it runs on CPU, CUDA and ROCm."


_MODELS = {
    "is_encoder_decoder": "encoder-decoder models",
    "is_multimodal_model": "multimodal models",
    "uses_mrope": "models with M-RoPE positions",
    "use_mla": "models with latent attention (MLA)",
    "is_moe": "mixture-of-experts models",
}

#: Checked before vLLM resolves the config, to say it more clearly than vLLM would.
BEFORE: tuple[Rule, ...] = (_asynchronous, _explicit_v2)

AFTER: tuple[Rule, ...] = (
    _platform,
    _resolved_v2,
    _asynchronous,
    _token_count,
    _draft_model_keys,
    _sampling_methods,
    _above_one(
        "parallel_config.pipeline_parallel_size",
        "--pipeline-parallel-size is {}, but drafting needs all layers on one rank; "
        "use --tensor-parallel-size.",
    ),
    _above_one(
        "parallel_config.decode_context_parallel_size",
        "--decode-context-parallel-size is {}, but only 1 is supported.",
    ),
    _above_one(
        "parallel_config.prefill_context_parallel_size",
        "--prefill-context-parallel-size is {}, but only 1 is supported.",
    ),
    _flag("parallel_config.enable_dbo", "--enable-dbo is not supported; remove it."),
    _flag("parallel_config.ubatch_size", "--ubatch-size is not supported; remove it."),
    _flag(
        "parallel_config.enable_expert_parallel",
        "--enable-expert-parallel is not supported: idle ranks would wait for draft steps.",
    ),
    _flag("parallel_config.enable_eplb", "--enable-eplb is not supported; remove it."),
    _pooling,
    _flag(
        "model_config.enable_prompt_embeds",
        "--enable-prompt-embeds gives rows without token ids to judge plans on; remove it.",
    ),
    *(
        _flag(f"model_config.{name}", f"{kind} are not supported; serve this one without KnapSpec.")
        for name, kind in _MODELS.items()
    ),
    _flag(
        "model_config.is_hybrid",
        "hybrid (Mamba, linear attention) models are not supported: drafts overwrite their state.",
    ),
    _flag(
        "model_config.has_inner_state",
        "state-space models are not supported: a draft would overwrite their state.",
    ),
    _architecture,
    _sliding_window,
    _chunked_attention,
    _flag("lora_config", "--enable-lora is not supported; remove it."),
    _flag(
        "kv_transfer_config",
        "--kv-transfer-config and --kv-offloading-size are not supported: a KV connector would "
        "save the draft's K/V; remove them.",
    ),
    _flag("ec_transfer_config", "--ec-transfer-config is not supported; remove it."),
    _flag(
        "cache_config.kv_sharing_fast_prefill",
        "--kv-sharing-fast-prefill is not supported; remove it.",
    ),
    _plan,
    _strategy,
)
