# SPDX-License-Identifier: Apache-2.0
"""What becomes of a KV cache that our kernels cannot read; those they can are in integration/."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knapspec_vllm.draft import cache_layout


@pytest.mark.parametrize(
    ("fp8", "capability", "read"),
    [
        (torch.float8_e4m3fn, (8, 0), False),  # A100: no e4m3 in Triton, though in FlashInfer
        (torch.float8_e4m3fn, (8, 6), False),
        (torch.float8_e4m3fn, (8, 9), True),
        (torch.float8_e4m3fn, (9, 0), True),
        (torch.float8_e5m2, (8, 0), True),
        (None, (8, 0), True),
    ],
)
def test_fp8_needs_a_gpu_that_triton_reads_it_on(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fp8: torch.dtype | None,
    capability: tuple[int, int],
    read: bool,
) -> None:
    """The server starts all the same, and says that it cannot solve."""
    layer: Any = SimpleNamespace(kv_cache=SimpleNamespace(device=torch.device("cuda")))
    layout = SimpleNamespace(fp8=fp8, bind=lambda layer: layer)
    monkeypatch.setattr(cache_layout, "CacheLayout", lambda layer, block_size: layout)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        assert cache_layout.bind_layers([layer, layer], 16) == ((layer, layer) if read else ())
    assert ("capability 8.9" in caplog.text) is not read
