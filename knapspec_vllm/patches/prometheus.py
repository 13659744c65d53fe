# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.metrics.prometheus: `knapspec:` metrics in whatever registry /metrics shows."""

from __future__ import annotations

import functools
import sys
from typing import Any

from knapspec_vllm import compat
from knapspec_vllm.metrics import exposition, run_folder
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name

#: Imports the function by name, perhaps before this plugin is loaded.
_IMPORTER = "vllm.entrypoints.serve.instrumentator.metrics"


def install() -> None:
    """Wrap the function where it is, and where it has been imported to."""
    patch = by_name("metrics_registry")
    owner, attribute = compat.resolve(patch.target)
    owners = [owner, *filter(None, [sys.modules.get(_IMPORTER)])]
    for module in owners:
        if hasattr(module, attribute):
            apply.replace(patch.name, module, attribute, _make_get, patch.seam.parameters)


def _make_get(original: Any) -> Any:
    @functools.wraps(original)
    def get_prometheus_registry(*args: Any, **kwargs: Any) -> Any:
        registry = original(*args, **kwargs)
        folder = run_folder.current()
        if folder is not None:
            exposition.register(registry, folder)
        return registry

    return get_prometheus_registry
