# SPDX-License-Identifier: Apache-2.0
"""For test_parallel, on PYTHONPATH of its processes: Ray's logical GPUs for vLLM's CPU build.

vLLM's Ray executor asks the platform which of Ray's resources its devices are, and the CPU platform
has none. Ray gives out logical GPUs to any machine, so here each stands for one CPU worker; all
else of the executor runs as it is.
"""

import importlib.abc
import importlib.machinery
import sys

PLATFORM = "vllm.platforms.cpu"


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.CpuPlatform.ray_device_key = "GPU"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != PLATFORM:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
