# SPDX-License-Identifier: Apache-2.0
"""`knapspec serve-args`: checked settings in the form that a deployment wants them in."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import Any

from knapspec_vllm.bench.options import json_object, positive
from knapspec_vllm.commands.output import answers_only
from knapspec_vllm.config import ADDITIONAL_CONFIG_KEY, KnapSpecConfig

DESCRIPTION = """\
Prints what selects KnapSpec, in one of five forms, after checking it: the settings always, and with
MODEL, where vLLM is installed, the whole configuration as a server would check it.
Exit status: 0 printed, 1 refused (nothing is printed), 2 wrong arguments."""
EXAMPLES = """\
examples:
  knapspec serve-args MODEL                                   # a command to copy
  knapspec serve-args --format yaml > serve.yaml              # for vllm serve --config
  knapspec serve-args --format helm --settings '{"min_speedup": 1.05}'"""
FORMS = ("shell", "yaml", "json", "helm", "ray")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve-args",
        help="print what selects KnapSpec: for a shell, YAML, Helm or Ray",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="model path or hub id: checked; in the shell form")
    parser.add_argument(
        "--format", choices=FORMS, default="shell",
        help="shell: a command line. yaml: for vllm serve --config. json: the two options' values. "
        "helm: vllmConfig of the production-stack chart. ray: engine_kwargs of Ray Serve LLM",
    )  # fmt: skip
    parser.add_argument("--num-speculative-tokens", type=positive, default=8, metavar="N")
    parser.add_argument("--settings", type=json_object, default={}, metavar="JSON")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    config = KnapSpecConfig.from_mapping(arguments.settings)
    if (reason := config.refuses(arguments.num_speculative_tokens)) is not None:
        raise ValueError(reason)
    settings = config.to_mapping()
    speculative = {
        "method": "knapspec",
        "num_speculative_tokens": arguments.num_speculative_tokens,
    }
    if arguments.model is not None:
        with answers_only():
            refused = _refusals(arguments, speculative, settings)
        for sentence in refused:
            print(f"knapspec: {sentence}", file=sys.stderr)
        if refused:
            return 1
    additional = {ADDITIONAL_CONFIG_KEY: settings} if settings else {}
    print(render(arguments.format, arguments.model or "MODEL", speculative, additional))
    return 0


def render(
    form: str, model: str, speculative: dict[str, Any], additional: dict[str, Any]
) -> str:  # fmt: skip
    """The settings as text of one of FORMS."""
    if form == "shell":
        words = ["vllm", "serve", model, "--speculative-config", json.dumps(speculative)]
        if additional:
            words += ["--additional-config", json.dumps(additional)]
        return shlex.join(words)
    dashed: dict[str, Any] = {"speculative-config": speculative}
    plain: dict[str, Any] = {"speculative_config": speculative}
    if additional:
        dashed["additional-config"] = plain["additional_config"] = additional
    if form == "json":
        return json.dumps(plain, indent=1)
    import yaml  # a dependency of vLLM

    if form == "helm":
        items = [text for key, value in dashed.items() for text in (f"--{key}", json.dumps(value))]
        value: Any = {"vllmConfig": {"extraArgs": items}}
    else:
        value = dashed if form == "yaml" else {"engine_kwargs": plain}
    return yaml.safe_dump(value, sort_keys=False).rstrip()


def _refusals(
    arguments: argparse.Namespace, speculative: dict[str, Any], settings: dict[str, Any]
) -> list[str]:
    """What a server would refuse; nothing, with a warning, where vLLM is not installed."""
    from knapspec_vllm import compat
    from knapspec_vllm.doctor import examine

    if compat.installed_tree() is None:
        print("knapspec: vLLM is not installed here, so MODEL is not checked", file=sys.stderr)
        return []
    engine_args = {"speculative_config": {**speculative, **settings}, **arguments.engine_args}
    checks = examine(arguments.model, engine_args)
    return [f"{check.reason} {check.advice}" for check in checks if check.status == "refused"]
