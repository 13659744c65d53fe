# SPDX-License-Identifier: Apache-2.0
"""Cost curves and the last frontier on disk, one file per hardware, model, dtype, TP and versions.

A file is used only if its whole fingerprint matches what is running; anything else (corrupt JSON,
another schema, foreign hardware) is ignored with a warning and measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import knapspec_vllm
from knapspec_vllm import compat
from knapspec_vllm.draft.attention import AttentionPath
from knapspec_vllm.draft.head import HeadKind
from knapspec_vllm.hardware import cpu_name
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.types import Frontier

logger = logging.getLogger("vllm.knapspec")

SCHEMA = 3


@dataclass(frozen=True)
class Calibration:
    """What a store entry holds."""

    costs: CostModel
    frontier: Frontier | None
    attention_path: AttentionPath = "backend"
    """Who computes draft attention; the costs were measured with it."""
    head: HeadKind = "full"
    """Which head drafted when they were."""
    measured_at: float | None = None
    """When, in seconds of the epoch."""


class CalibrationStore:
    """Reads and atomically writes the entry of one fingerprint. I/O errors are only warnings."""

    def __init__(self, directory: Path, fingerprint: dict[str, Any]) -> None:
        self._fingerprint = fingerprint
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.path = directory / f"{digest}.json"

    def load(self) -> Calibration | None:
        """The stored calibration, or None when there is none that can be trusted."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("KnapSpec ignores the calibration file %s: %s", self.path, error)
            return None
        try:
            entry = json.loads(text)
            if entry["schema"] != SCHEMA or entry["fingerprint"] != self._fingerprint:
                raise ValueError("it was written for another machine, model or version")
            frontier = entry["frontier"]
            return Calibration(
                CostModel.from_json(entry["costs"]),
                None if frontier is None else Frontier.from_json(frontier),
                _one_of("attention_path", entry, ("backend", "kernel")),
                _one_of("head", entry, ("full", "screened")),
                entry.get("measured_at"),
            )
        except (ValueError, KeyError, TypeError) as error:
            logger.warning(
                "KnapSpec ignores the calibration file %s (%s) and measures again", self.path, error
            )
            return None

    def save(self, calibration: Calibration) -> None:
        """Write atomically; a failure only costs the next start its reuse."""
        frontier = calibration.frontier
        entry = {
            "schema": SCHEMA,
            "fingerprint": self._fingerprint,
            "costs": calibration.costs.to_json(),
            "frontier": None if frontier is None else frontier.to_json(),
            "attention_path": calibration.attention_path,
            "head": calibration.head,
            "measured_at": calibration.measured_at,
        }
        name = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump(entry, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except OSError as error:
            if name is not None:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
            logger.warning("KnapSpec could not store its calibration in %s: %s", self.path, error)


def _one_of(name: str, entry: dict[str, Any], known: tuple[str, ...]) -> Any:
    if entry[name] not in known:
        raise ValueError(f"{name} must be {' or '.join(known)}, got {entry[name]!r}")
    return entry[name]


def store_directory(configured: str | None) -> Path:
    """The configured directory, else `knapspec/` under vLLM's cache root."""
    if configured is not None:
        return Path(configured).expanduser()
    return compat.cache_root() / "knapspec"


def fingerprint(
    vllm_config: Any,
    num_speculative_tokens: int,
    settings: dict[str, Any],
    engine: dict[str, Any],
) -> dict[str, Any]:
    """Everything that cost curves depend on, JSON-ready.

    settings: the KnapSpec settings that change what is measured. engine: what vLLM decided when it
    started that does.
    """
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    return {
        "hardware": _hardware(),
        "model": str(model.model),
        "model_config": _config_hash(model),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "tensor_parallel": int(parallel.tensor_parallel_size),
        "eager": bool(model.enforce_eager),
        "cudagraph_mode": str(vllm_config.compilation_config.cudagraph_mode),
        "engine": engine,
        "max_model_len": int(model.max_model_len),
        "num_speculative_tokens": num_speculative_tokens,
        "settings": settings,
        "versions": {
            "vllm": compat.vllm_version(),
            "torch": torch.__version__,
            "knapspec": knapspec_vllm.__version__,
        },
    }


def _config_hash(model: Any) -> str:
    config = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(config.encode()).hexdigest()[:16]


def hardware_name() -> str:
    """Of the device that the worker computes on."""
    return str(_hardware()["device"])


def _hardware() -> dict[str, Any]:
    if torch.cuda.is_available():
        # Not how many: ranks are in the fingerprint, and other GPUs of the node change nothing.
        return {"device": torch.cuda.get_device_name()}
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
