# SPDX-License-Identifier: Apache-2.0
"""KnapSpec against plain vLLM, batch 1, greedy: `python tests/benchmarks/bench_speed.py planted`.

planted     block-expanded SmolLM2 (two of three layers nearly redundant), 200 tokens, both eager
real        SmolLM2 on short chat prompts, both eager (--compiled: both as vLLM ships them)
unselected  plain vLLM with the plugin installed but not selected, against vLLM without it
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from arms import Arm, alternate, report

from knapspec_vllm.bench.checkpoints import expand_blocks, smollm2

QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that reverses a linked list.",
    "What should I see in Rome in two days?",
    "Summarise the plot of Romeo and Juliet.",
    "How do I boil an egg so that the yolk stays soft?",
)


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
    arms, prompts = ARMS[arguments.what](arguments)
    sampling = {"temperature": 0, "max_tokens": arguments.tokens}
    print(f"{arguments.what}: {len(prompts)} prompts one at a time, {arguments.tokens} tokens each")
    alternate(arms, prompts, 1, sampling, arguments.rounds)
    context = {
        "what": arguments.what,
        "dtype": arguments.dtype,
        "eager": not arguments.compiled,
        "batch": 1,
        "prompt_tokens": [len(ids) for ids in prompts],
        "output_tokens": arguments.tokens,
    }
    name = arguments.name or f"speed-{arguments.what}{'-compiled' if arguments.compiled else ''}"
    rows = report(arms, len(prompts) * arguments.tokens, context, name)
    if arguments.at_least is not None and rows[1]["ratio_of_medians"] < arguments.at_least:
        print(
            f"{rows[1]['arm']}: {rows[1]['ratio_of_medians']:.2f}x is below {arguments.at_least}x"
        )
        return 1
    return 0


def planted(arguments: argparse.Namespace) -> tuple[list[Arm], list[list[int]]]:
    source = smollm2()
    model = expand_blocks(source)
    prompts = [tokenizer(source).encode(pydoc_data.topics.topics["assert"])[:180]]
    return [Arm("plain", engine(model, arguments)), *knapspec_arms(model, arguments)], prompts


def real(arguments: argparse.Namespace) -> tuple[list[Arm], list[list[int]]]:
    model = smollm2()
    return [Arm("plain", engine(model, arguments)), *knapspec_arms(model, arguments)], chats(model)


def unselected(arguments: argparse.Namespace) -> tuple[list[Arm], list[list[int]]]:
    model = smollm2()
    settings = engine(model, arguments)
    return [
        Arm("without the plugin", settings, {"VLLM_PLUGINS": ""}),
        Arm("installed, not selected", settings),
    ], chats(model)


ARMS = {"planted": planted, "real": real, "unselected": unselected}


def engine(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": arguments.dtype,
        "enforce_eager": not arguments.compiled,
        "max_model_len": 2048,
        "max_num_seqs": 8,
    }


def knapspec_arms(model: Path, arguments: argparse.Namespace) -> list[Arm]:
    """With empty calibration stores: the first start measures, the first request solves."""
    arms = []
    for settings in arguments.settings or [{}]:
        store = tempfile.mkdtemp(prefix="knapspec-store-")
        speculative = {"method": "knapspec", "num_speculative_tokens": 8, "store_dir": store}
        name = " ".join(["knapspec", *(f"{key}={value}" for key, value in settings.items())])
        config = {**engine(model, arguments), "speculative_config": {**speculative, **settings}}
        arms.append(Arm(name, config))
    return arms


def chats(model: Path) -> list[list[int]]:
    tok = tokenizer(model)
    return [
        list(
            tok.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for question in QUESTIONS
    ]


def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


if __name__ == "__main__":
    sys.exit(main())
