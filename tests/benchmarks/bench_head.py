# SPDX-License-Identifier: Apache-2.0
"""The draft's head, full and screened: `python tests/benchmarks/bench_head.py --out F.json`.

One engine in this process. For each number of rows the heads take turns, each behind a draft
forward of everything that ended with the other kind of head: what it leaves of its weights in the
caches is what drafting leaves there.

full, probabilities   the model's head and the sum of exponentials that `confidence_threshold` needs
full                  the model's head and the highest logit
screened              8-bit logits of all tokens, the head's own of the likeliest few

The states are the model's own, of answers to passages of the Python reference manual: there it
counts as well how often a screened head finds the full one's token, and how often the 8-bit logits
alone would.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # looked into from here
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engines import engine, output_states, proposer_of, text_prompts

from knapspec_vllm.bench.checkpoints import smollm2
from knapspec_vllm.bench.provenance import provenance
from knapspec_vllm.calibration import cells, profiler
from knapspec_vllm.draft.head import GreedyHead

SETTINGS = {"draft_head": "screened", "plan": "skip mlp:1", "draft_length": 1}
TURNS = 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = arguments.model or smollm2()
    found: dict[str, Any] = {"provenance": provenance(), "model": model.name, "cells": []}
    for dtype in arguments.dtype:
        options = {"dtype": dtype, "max_model_len": 1024, "max_num_seqs": max(arguments.rows)}
        with engine(model, SETTINGS, **options) as llm, torch.inference_mode():
            states = output_states(llm, text_prompts(model, (200,) * 32), 64)
            found["cells"].append({"dtype": dtype, "agreement": agreement(llm, states)})
            print(json.dumps(found["cells"][-1]))
            for rows in arguments.rows:
                found["cells"].append({"dtype": dtype, "rows": rows, **times(llm, states, rows)})
                print(json.dumps(found["cells"][-1]))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def agreement(llm: Any, states: torch.Tensor) -> dict[str, float]:
    """Shares of the states for which they find the full head's token."""
    view, screen = proposer_of(llm).engine.view, proposer_of(llm).screen
    alike = {"screened": 0, "8-bit logits alone": 0}
    for part in states.split(64):
        wanted = view.logits(part).argmax(dim=-1)
        alike["screened"] += int((screen.partials(part, False)[0] == wanted).sum())
        rough = screen.rough_logits(part).argmax(dim=-1)
        alike["8-bit logits alone"] += int((rough == wanted).sum())
    return {"states": len(states), **{name: n / len(states) for name, n in alike.items()}}


def times(llm: Any, states: torch.Tensor, rows: int) -> dict[str, Any]:
    """[fastest, median] microseconds of each head."""
    proposer = proposer_of(llm)
    served, hidden = proposer.engine, states[:rows].contiguous()
    fakes = profiler.fake_rows(served, cells.Cell(rows, 200), 1)
    plan = profiler.uniform_plans(served.view.num_layers)["draft_full"]
    step = profiler.draft_step(proposer.drafter, plan, fakes, 1, captured=False)
    heads = {
        "full, probabilities": GreedyHead(served.view, confident=True),
        "full": GreedyHead(served.view, confident=False),
        "screened": GreedyHead(served.view, confident=False),
    }
    heads["screened"].screen = proposer.screen
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(TURNS):
        for name, head in heads.items():
            proposer.drafter.head.screen = None if name == "screened" else proposer.screen
            step()
            served.synchronize()
            start = time.perf_counter()
            head(hidden)
            served.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: [round(1e6 * min(taken[2:])), round(1e6 * statistics.median(taken[2:]))]
        for name, taken in seconds.items()
    }


if __name__ == "__main__":
    main()
