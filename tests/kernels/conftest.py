# SPDX-License-Identifier: Apache-2.0
"""Every kernel test runs twice: over the eager twin, and over Triton.

Triton is compiled where there is a GPU and interpreted elsewhere (the root conftest switches the
interpreter on before anything imports triton).
"""

import pytest
import torch

from knapspec_vllm import envs, ops


@pytest.fixture(params=["eager", "triton"])
def implementation(request, monkeypatch) -> str:
    """Makes ops run this implementation, and checks afterwards that they did."""
    monkeypatch.setenv(envs.KERNELS, "eager" if request.param == "eager" else "auto")
    ops.launches.clear()
    yield request.param
    assert {kind for _, kind in ops.launches} <= {request.param}


@pytest.fixture
def device(request) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
