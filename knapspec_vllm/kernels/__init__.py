# SPDX-License-Identifier: Apache-2.0
"""Checkout alias of the top-level `kernels/` folder; the wheel carries the real files here.

Import submodules only (`knapspec_vllm.kernels.reference`); the public functions are in
`knapspec_vllm.ops`.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
