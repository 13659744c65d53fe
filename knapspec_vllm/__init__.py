# SPDX-License-Identifier: Apache-2.0
"""KnapSpec self-speculative decoding for vLLM.

Importing this package imports nothing heavy. vLLM may be told to load the proposer by this
package's name (``"model": "knapspec_vllm.KnapSpecProposer"``), so public names resolve lazily.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

try:
    __version__ = importlib.metadata.version("knapspec-vllm")
except importlib.metadata.PackageNotFoundError:  # a checkout on sys.path, not installed
    __version__ = "0.0.0+checkout"

#: public name -> module that defines it
_LAZY = {
    "KnapSpecConfig": "knapspec_vllm.config",
    "KnapSpecProposer": "knapspec_vllm.draft.proposer",
    "Plan": "knapspec_vllm.planner.types",
    "UnsupportedVllmError": "knapspec_vllm.compat",
}

__all__ = [
    "KnapSpecConfig",
    "KnapSpecProposer",
    "Plan",
    "UnsupportedVllmError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
