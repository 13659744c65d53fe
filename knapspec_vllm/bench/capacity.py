# SPDX-License-Identifier: Apache-2.0
"""How many engines fit in this machine's memory at once, and how large their KV caches must be."""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

GIB = 1 << 30
#: Per engine besides weights and KV cache: Python processes with torch, activations, graphs.
OVERHEAD_BYTES = 3 * GIB
#: vLLM's own default, divided among the engines of a GPU.
GPU_MEMORY_UTILIZATION = 0.9
#: Blocks are not full, and a draft may need one more per row.
_SPARE_TOKENS = 256


@functools.cache
def on_gpu() -> bool:
    """Whether `nvidia-smi` lists a GPU: the question that chose the vLLM build."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)
    return listing.returncode == 0 and b"GPU" in listing.stdout


def free_gpu_bytes() -> int:
    """Of the first GPU; asked without making a CUDA context."""
    from knapspec_vllm.bench.provenance import gpu_query

    free = gpu_query("memory.free")
    return int(free) << 20 if free is not None and free.isdigit() else 0


def available_memory() -> int:
    """Bytes that can be used without swapping; 0 where unknown."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def weight_bytes(model: str) -> int | None:
    """Of a local checkpoint; None for a hub id."""
    if not Path(model).is_dir():
        return None
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def kv_bytes(config: Any, batch: int, tokens: int, dtype: str = "auto") -> int:
    """KV cache of `batch` rows of `tokens` tokens. config: the model's, from transformers."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    own = str(getattr(text, "dtype", None) or getattr(text, "torch_dtype", ""))
    number = 4 if "float32" in (own if dtype == "auto" else dtype) else 2
    return 2 * text.num_hidden_layers * heads * size * number * batch * (tokens + _SPARE_TOKENS)


def kv_space_gib(needed: int) -> int:
    """Whole GiB, as VLLM_CPU_KVCACHE_SPACE counts."""
    return max(1, math.ceil(1.1 * needed / GIB))


def engines_at_once(arms: int, weights: int | None, kv: int, gpus: int = 1) -> int:
    """Engines to keep in memory together, up to `arms`; 2 where the weights' size is unknown.

    2 is the least that can take turns, so it is the answer, too, where even that looks too many.
    """
    if weights is None:
        return min(arms, 2)
    available = free_gpu_bytes() if on_gpu() else available_memory()
    space = kv if on_gpu() else kv_space_gib(kv) * GIB
    per_engine = (1.05 * weights + space) / gpus + OVERHEAD_BYTES
    return min(arms, max(2, int(0.95 * available / per_engine)))
