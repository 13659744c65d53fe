# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins: knapspec``, called by vLLM in every one of its processes.

It runs before any VllmConfig exists, so it cannot know whether KnapSpec will be selected: it stays
silent, never raises, and installs only wrappers that fall straight through until it is.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.knapspec")


def register() -> None:
    """Install the config-time patches. Safe to call any number of times."""
    from knapspec_vllm import compat, patches

    try:
        compat.check_version()
        patches.install_in_process()
    except Exception as reason:
        _stand_by(reason)


def _stand_by(reason: Exception) -> None:
    """Leave vLLM as it is, but say `reason` to whoever selects KnapSpec."""
    from knapspec_vllm import patches

    try:
        patches.install_refusal(reason)
        logger.debug("KnapSpec is installed but cannot be used: %s", reason)
    except Exception as second:
        logger.warning("KnapSpec is installed but cannot be used: %s (%s)", reason, second)
