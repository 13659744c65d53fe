# SPDX-License-Identifier: Apache-2.0
"""The only environment variables that serving reads.

Settings never live in the environment: Ray does not copy it to workers. See config.py for them.
"""

from __future__ import annotations

import os

DISABLE = "KNAPSPEC_DISABLE"
ALLOW_UNTESTED_VLLM = "KNAPSPEC_ALLOW_UNTESTED_VLLM"
KERNELS = "KNAPSPEC_KERNELS"
RUN_FOLDER = "KNAPSPEC_RUN_FOLDER"
"""Not for users: where a server's processes meet, see metrics/run_folder.py."""

_FALSE = {"", "0", "false", "no", "off"}


def disabled() -> bool:
    """``KNAPSPEC_DISABLE=1``: a server told to use KnapSpec starts without speculation."""
    return _is_set(DISABLE)


def allow_untested_vllm() -> bool:
    """``KNAPSPEC_ALLOW_UNTESTED_VLLM=1``: skip the version range, not the capability probes."""
    return _is_set(ALLOW_UNTESTED_VLLM)


def eager_kernels() -> bool:
    """``KNAPSPEC_KERNELS=eager``: torch instead of Triton, to tell a kernel's bug apart."""
    return os.environ.get(KERNELS, "").strip().lower() == "eager"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in _FALSE
