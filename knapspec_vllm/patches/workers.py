# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.worker.gpu_worker and cpu_worker: attach and calibrate after warm-up.

Imported only in workers whose config selects KnapSpec. Every tensor-parallel rank runs the same
hook: the proposer measures together or not at all.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from knapspec_vllm.metrics import ray_sink, run_folder
from knapspec_vllm.metrics.publisher import FileSink, Publisher, Sink
from knapspec_vllm.patches import apply, async_scheduler
from knapspec_vllm.patches.gpu_model_runner import drafter_of
from knapspec_vllm.patches.ledger import PATCHES

_METHOD = "compile_or_warm_up_model"


def install(worker_class: type) -> None:
    """Wrap the method on the class that defines it for `worker_class` (users may subclass)."""
    owner = next(cls for cls in worker_class.__mro__ if _METHOD in vars(cls))
    target = f"{owner.__module__}:{owner.__qualname__}.{_METHOD}"
    known = {patch.target: patch.name for patch in PATCHES}
    apply.replace(known.get(target, "calibrate_gpu"), owner, _METHOD, _make_warm_up)


def _make_warm_up(original: Any) -> Any:
    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        runner = getattr(self, "model_runner", None)
        drafter = drafter_of(runner)
        if drafter is not None:
            from knapspec_vllm.calibration.startup import calibrate

            with _random_state_kept(runner), _compiling_expected():
                drafter.attach(runner)
                calibrate(drafter)
            if drafter.scheduling is not None:
                async_scheduler.register(self.vllm_config, drafter.scheduling)
            _publish(drafter, self.vllm_config)
        return result

    return compile_or_warm_up_model


def _publish(drafter: Any, vllm_config: Any) -> None:
    """From rank 0: the others decide nothing and count the same."""
    folder, in_ray = run_folder.current(), ray_sink.in_ray()
    if (folder is None and not in_ray) or not drafter.agreement.leads:
        return
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    engine = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    sinks: list[Sink] = [] if folder is None else [FileSink(folder, engine)]
    if in_ray:
        sinks.append(ray_sink.RaySink())
    alive = weakref.ref(drafter)

    def read() -> dict[str, Any] | None:
        proposer = alive()
        return None if proposer is None else proposer.snapshot()

    names = model.served_model_name
    name = names if isinstance(names, str) else (names or [model.model])[0]
    Publisher(sinks, engine, name, read).start()


@contextmanager
def _compiling_expected() -> Iterator[None]:
    """This, too, is warming up: vLLM's monitor of kernels that are compiled while it serves is on
    already, and may be set to raise."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    hook, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, None
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = hook


def _random_state_kept(runner: Any) -> Any:
    """vLLM has just reset the seed: measuring must not change what a seed produces."""
    import torch

    device = getattr(runner, "device", None)
    on_gpu = device is not None and torch.device(device).type == "cuda"
    return torch.random.fork_rng(devices=[torch.device(device)] if on_gpu else [])
