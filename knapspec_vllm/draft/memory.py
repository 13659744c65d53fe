# SPDX-License-Identifier: Apache-2.0
"""What KnapSpec needs beyond plain vLLM, captured draft steps aside, which are measured as they are
made, and the copy of the head, which knows its size (`ScreenedHead.bytes`). No KV cache of its own
and no other weights: this is all."""

from __future__ import annotations

from typing import Any

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.draft.branches import LOGIT_ROWS
from knapspec_vllm.draft.engine import Engine

#: Streams that live together in a solver step: before, after FULL, after WINDOW, gathered, normed,
#: and the output of the item itself.
_STREAMS = 6


def added_bytes(
    engine: Engine, config: KnapSpecConfig, num_speculative_tokens: int
) -> dict[str, int]:
    """Upper bounds in bytes, by kind.

    solver: while a solve runs, and for good where solves are captured; its largest tensors are the
    branches' streams and the logits of one part of them. draft: a round's states and head, of the
    largest batch. lookahead: KV cache slots that vLLM allocates ahead of running requests, all of
    them at once; part of its cache, not on top of it.
    """
    model = engine.vllm_config.model_config
    parallel = engine.vllm_config.parallel_config
    size = engine.dtype.itemsize
    hidden, vocabulary = model.get_hidden_size(), model.get_vocab_size()
    branches = config.live_branches + 1
    tokens = branches * config.reference_tokens * config.reference_rows
    widest = max(hidden, _mlp_width(model, parallel))
    streams = tokens * (_STREAMS * hidden + 2 * widest) * size
    logits = min(tokens, LOGIT_ROWS) * vocabulary * (size + 4)
    rows = engine.vllm_config.scheduler_config.max_num_seqs
    blocks = rows * -(-engine.max_model_len // engine.block_size)
    draft = rows * (vocabulary * (size + 4) + 4 * widest * size) + 4 * blocks
    lookahead = rows * num_speculative_tokens * _kv_bytes_per_token(engine)
    return {"solver": streams + logits, "draft": draft, "lookahead": lookahead}


def _mlp_width(model: Any, parallel: Any) -> int:
    width = getattr(model.hf_text_config, "intermediate_size", None) or 0
    return int(width) // int(parallel.tensor_parallel_size)


def _kv_bytes_per_token(engine: Engine) -> int:
    """Of all layers on this rank."""
    layers = [engine.view.attention_layer(i) for i in range(engine.view.num_layers)]
    per_token = 0
    for layer in layers:
        cache = layer.kv_cache[0] if isinstance(layer.kv_cache, list | tuple) else layer.kv_cache
        if cache.numel():
            per_token += (
                cache.numel() * cache.element_size() // (engine.num_blocks * engine.block_size)
            )
    return per_token
