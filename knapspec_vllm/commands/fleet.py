# SPDX-License-Identifier: Apache-2.0
"""`knapspec calibrate --ray`: one calibration per kind of node of a Ray cluster.

Nodes are of one kind if they have the same accelerators or, without any, the same CPUs: curves are
kept per device name, so measuring two of a kind would only write the same entry twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knapspec_vllm.bench.engines import root_cause
from knapspec_vllm.commands.calibrate import Report
from knapspec_vllm.commands.output import answers_only, under_way
from knapspec_vllm.hardware import cpu_name

_ACCELERATOR = "accelerator_type:"


def calibrate_fleet(
    model: str, options: dict[str, Any], batches: Sequence[int], contexts: Sequence[int]
) -> list[Report]:
    """Calibrate on one node of every kind, and bring all entries into the store here.

    Raises RuntimeError when ray is missing, or when a node failed; the others' entries are kept.
    """
    try:
        import ray
    except ImportError as error:
        raise RuntimeError("--ray needs the package ray: pip install ray") from error
    from knapspec_vllm.calibration.store import store_directory

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    try:
        store = store_directory(options["speculative_config"].get("store_dir"))
        ranks = int(options.get("tensor_parallel_size") or 1)
        kinds = node_kinds(ray, ranks)
        waiting = {}
        for kind, node in kinds.items():
            gpus = ranks if node["Resources"].get("GPU", 0) else 0
            on_node = _remote(ray, node["NodeID"], gpus)
            waiting[kind] = on_node.remote(model, options, list(batches), list(contexts))
        reports, failures = [], []
        for number, (kind, future) in enumerate(waiting.items(), 1):
            try:
                with under_way(f"measuring on {kind} ({number} of {len(waiting)} kinds of node)"):
                    report, entries = ray.get(future)
            except Exception as error:
                failures.append(f"{kind}: {_last_line(error)}")
                continue
            path = merge(entries, store)
            reports.append(Report.from_dict({**report, "path": str(path)}))
        if failures:
            raise RuntimeError("calibration failed on " + "; ".join(failures))
        return reports
    finally:
        if started_here:
            ray.shutdown()


def node_kinds(ray: Any, ranks: int) -> dict[str, dict[str, Any]]:
    """Kind -> one live node of it, with as many GPUs as there are ranks if it has any.

    Nodes without an accelerator are asked for their CPU.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kinds: dict[str, dict[str, Any]] = {}
    names = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        accelerators = sorted(
            name.removeprefix(_ACCELERATOR)
            for name in node["Resources"]
            if name.startswith(_ACCELERATOR)
        )
        gpus = node["Resources"].get("GPU", 0)
        if 0 < gpus < ranks:
            continue
        if gpus:
            kinds.setdefault(" + ".join(accelerators) or "GPU", node)
        elif node["Resources"].get("CPU", 0):
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked = ray.remote(num_cpus=0, scheduling_strategy=strategy)(cpu_name).remote()
            names[node["NodeID"]] = (asked, node)
    for asked, node in names.values():
        cores = node["Resources"]["CPU"]
        kinds.setdefault(f"{ray.get(asked)}, {cores:.0f} CPUs", node)
    if not kinds:
        raise RuntimeError(f"the Ray cluster has no live node with a CPU or {ranks} GPUs")
    return kinds


def _remote(ray: Any, node_id: str, gpus: int) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A process of its own per call: an engine leaves state behind, and its logs must not mix.
    return ray.remote(
        num_gpus=gpus,
        num_cpus=0 if gpus else 1,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )(calibrate_here)


def calibrate_here(
    model: str, options: dict[str, Any], batches: list[int], contexts: list[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs on a node: (report, store entries by file name)."""
    with tempfile.TemporaryDirectory(prefix="knapspec-calibrate-") as folder:
        speculative = {**options["speculative_config"], "store_dir": folder}
        # Ray has given this task the node; the engine in it must not ask Ray for another.
        options = {**options, "speculative_config": speculative}
        if options.pop("distributed_executor_backend", None) is not None:
            options["distributed_executor_backend"] = "mp"
        # Ray sets it to the task's CPUs; a server has the node's.
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        done = subprocess.run(
            [sys.executable, "-m", "knapspec_vllm.commands.fleet"],
            input=json.dumps([model, options, batches, contexts]),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            raise RuntimeError(root_cause(done.stderr) or f"status {done.returncode}")
        report = json.loads(done.stdout.strip().splitlines()[-1])
        return report, {path.name: path.read_text() for path in Path(folder).glob("*.json")}


def merge(entries: dict[str, str], store: Path) -> Path:
    """Write the entries of a node; the same name is the same hardware, model and versions.

    Returns the path of the last.
    """
    store.mkdir(parents=True, exist_ok=True)
    path = store
    for name, text in entries.items():
        path = store / Path(name).name
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)
    return path


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def main() -> None:
    """One calibration, told by standard input, in a process of its own on a node."""
    from knapspec_vllm.commands.calibrate import calibrate

    with answers_only() as answer:
        report = calibrate(*json.loads(sys.stdin.read()))
        print(json.dumps(report.as_dict()), file=answer)


if __name__ == "__main__":
    main()
