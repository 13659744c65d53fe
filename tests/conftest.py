# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and the environment vLLM starts in.

The variables are set before anything imports vLLM and only where the caller has not set them.
"""

import importlib.util
import os
import random
from pathlib import Path

import pytest


def _has_gpu() -> bool:
    """Without importing torch, which would be too early for the variables below."""
    return Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in this process: tests can look inside
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a bound thread would outlive the engine that bound it
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",  # every model is made here
    "TOKENIZERS_PARALLELISM": "false",
    # Kernel tests run Triton's interpreter where there is no GPU. It must be on before the first
    # import of triton; everything else then has to be told to keep to the eager twins.
    "TRITON_INTERPRET": "1" if not _has_gpu() else "0",
    "KNAPSPEC_KERNELS": "eager" if not _has_gpu() else "auto",
    "OMP_NUM_THREADS": str(min(os.cpu_count() or 1, 8)),
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    if HAS_TORCH:
        import torch

        torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct: real text, the model of the parity tests."""
    from knapspec_vllm.bench.checkpoints import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def expanded_path(smollm2_path: Path) -> Path:
    """Its block expansion: real text, 120 of 180 items known to be skippable."""
    from knapspec_vllm.bench.checkpoints import expand_blocks

    return expand_blocks(smollm2_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
