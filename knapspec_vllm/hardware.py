# SPDX-License-Identifier: Apache-2.0
"""What this machine computes on, by name: calibrations and benchmarks belong to one."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """As the kernel calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
