# SPDX-License-Identifier: Apache-2.0
"""Where the benchmarks of this folder write, and with what they ran."""

from __future__ import annotations

from pathlib import Path

from knapspec_vllm.bench.provenance import provenance

__all__ = ["RESULTS", "provenance"]

RESULTS = Path(__file__).parent / "results"
