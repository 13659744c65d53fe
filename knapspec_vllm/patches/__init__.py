# SPDX-License-Identifier: Apache-2.0
"""Every change KnapSpec makes to vLLM, in two steps: any process, and selected workers.

`ledger` is the list; `apply` replaces attributes; each other file is named after the vLLM module
it patches and wraps what is there, copying none of it.
"""

from __future__ import annotations

from pathlib import Path

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import PATCHES, Patch


def install_in_process() -> None:
    """The config-time patches. All or nothing: a failure undoes them and is raised.

    Imports neither the model runner nor anything that touches a device.
    """
    from knapspec_vllm.patches import (
        arg_utils,
        sampling_params,
        scheduler,
        vllm_config,
        worker_base,
    )

    modules = (arg_utils, vllm_config, scheduler, worker_base, sampling_params)
    try:
        for module in modules:
            module.install()
    except Exception:
        apply.restore_all()
        raise


def install_refusal(reason: Exception) -> None:
    """Change nothing except that selecting KnapSpec raises `reason`."""
    from knapspec_vllm.patches import arg_utils

    arg_utils.install(refusal=reason)


def install_in_worker(worker_class: type) -> None:
    """The runner and worker patches, in a worker whose config selects KnapSpec."""
    from knapspec_vllm.patches import (
        cpu_triton_utils,
        gpu_model_runner,
        rejection_sampler,
        workers,
    )

    gpu_model_runner.install()
    workers.install(worker_class)
    rejection_sampler.install()
    cpu_triton_utils.install()


def problems(tree: Path) -> list[str]:
    """What the vLLM source in `tree` lacks of everything we patch or read."""
    missing = {patch.name: problem for patch in PATCHES if (problem := _problem(patch, tree))}
    for patch in PATCHES:
        if patch.stands_in_for and patch.stands_in_for in missing and patch.name not in missing:
            del missing[patch.stands_in_for]
    return [*missing.values(), *compat.probe_all(compat.READ_SEAMS, tree)]


def _problem(patch: Patch, tree: Path) -> str | None:
    return compat.probe(patch.seam, tree)
