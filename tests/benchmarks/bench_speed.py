# SPDX-License-Identifier: Apache-2.0
"""KnapSpec against plain vLLM, batch 1, greedy: `python tests/benchmarks/bench_speed.py planted`.

planted     block-expanded SmolLM2 (two of three layers nearly redundant), 200 tokens, both eager
real        SmolLM2 on short chat prompts, both eager (--compiled: both as vLLM ships them)
unselected  plain vLLM with the plugin installed but not selected, against vLLM without it
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from arms import RESULTS, provenance

from knapspec_vllm.bench.arms import PLAIN
from knapspec_vllm.bench.checkpoints import expand_blocks, smollm2
from knapspec_vllm.bench.engines import Engine, running
from knapspec_vllm.bench.figures import all_figures, write_json
from knapspec_vllm.bench.grid import Protocol, measure_cell
from knapspec_vllm.bench.results import Cell, Results
from knapspec_vllm.bench.tables import cell_table, notes
from knapspec_vllm.bench.workloads import QUESTIONS, chat_parts

MAX_MODEL_LEN = 2048


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["planted", "real", "unselected"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--compiled", action="store_true", help="vLLM's default compilation, both arms"
    )
    parser.add_argument(
        "--settings",
        type=json.loads,
        action="append",
        help="KnapSpec settings as JSON; given several times, one arm each",
    )
    parser.add_argument("--name", help="name of the result file (default: speed-WHAT)")
    parser.add_argument("--at-least", type=float, help="exit with status 1 below this median ratio")
    arguments = parser.parse_args()
    engines, prompts = ARMS[arguments.what](arguments)
    cell = Cell(batch=1, context=max(map(len, prompts)))
    results = Results(
        provenance(),
        {
            "what": arguments.what,
            "dtype": arguments.dtype,
            "eager": not arguments.compiled,
            "prompt_tokens": [len(ids) for ids in prompts],
            "output_tokens": arguments.tokens,
        },
        {e.name: {"speculative_config": e.settings.get("speculative_config")} for e in engines},
        cells=[cell],
    )
    protocol = Protocol(arguments.rounds, tokens=arguments.tokens, requests=len(prompts))
    print(f"{arguments.what}: {len(prompts)} prompts one at a time, {arguments.tokens} tokens each")
    with running(engines):
        results.measurements = measure_cell(
            engines, cell, protocol, lambda number: prompts, say=print
        )
    for engine in engines:
        results.arms[engine.name]["engine"] = engine.facts
    rows = all_figures(results)
    print(f"\n{cell_table(rows)}\n\n{notes()}")
    name = arguments.name or f"speed-{arguments.what}{'-compiled' if arguments.compiled else ''}"
    RESULTS.mkdir(exist_ok=True)
    write_json(results, RESULTS / f"{name}.json")
    print(f"\nwrote {name}.json")
    least, ratio = arguments.at_least, rows[1].ratio
    if least is not None and (ratio is None or ratio < least):
        print(f"{rows[1].arm}: {ratio} is below {least}x")
        return 1
    return 0


def planted(arguments: argparse.Namespace) -> tuple[list[Engine], list[list[int]]]:
    source = smollm2()
    model = expand_blocks(source)
    prompts = [tokenizer(source).encode(pydoc_data.topics.topics["assert"])[:180]]
    return [plain(model, arguments), *knapspec(model, arguments)], prompts


def real(arguments: argparse.Namespace) -> tuple[list[Engine], list[list[int]]]:
    model = smollm2()
    return [plain(model, arguments), *knapspec(model, arguments)], chats(model)


def unselected(arguments: argparse.Namespace) -> tuple[list[Engine], list[list[int]]]:
    """The baseline is vLLM without the plugin."""
    model = smollm2()
    return [
        plain(model, arguments, VLLM_PLUGINS=""),
        Engine("not selected", settings(model, arguments), environment(arguments)),
    ], chats(model)


ARMS = {"planted": planted, "real": real, "unselected": unselected}


def settings(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": arguments.dtype,
        "enforce_eager": not arguments.compiled,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
    }


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Eager engines run in the worker's own process, with all cores; others as vLLM ships them."""
    wanted = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if not arguments.compiled:
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def plain(model: Path, arguments: argparse.Namespace, **variables: str) -> Engine:
    return Engine(PLAIN, settings(model, arguments), {**environment(arguments), **variables})


def knapspec(model: Path, arguments: argparse.Namespace) -> list[Engine]:
    """With empty calibration stores: the first start measures, the first request solves."""
    engines = []
    for own in arguments.settings or [{}]:
        store = tempfile.mkdtemp(prefix="knapspec-store-")
        speculative = {"method": "knapspec", "num_speculative_tokens": 8, "store_dir": store}
        name = " ".join(["knapspec", *(f"{key}={value}" for key, value in own.items())])
        config = {**settings(model, arguments), "speculative_config": {**speculative, **own}}
        engines.append(Engine(name, config, environment(arguments)))
    return engines


def chats(model: Path) -> list[list[int]]:
    tok = tokenizer(model)
    return [
        [part for side in chat_parts(tok, question) for part in side] for question in QUESTIONS[:5]
    ]


def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


if __name__ == "__main__":
    sys.exit(main())
