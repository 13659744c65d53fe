# SPDX-License-Identifier: Apache-2.0
"""A model of Llama 3.1 8B's shape, random weights and planted plans, for GPUs without a network.

    python tests/benchmarks/planted_8b.py FOLDER [--tokenizer FOLDER]

8 layers of random weights, each followed by 3 copies whose output projections are scaled by `eps`,
as `bench.checkpoints.expand_blocks` does: skipping a copy changes the residual stream by about
`eps` of one sublayer, so that the copies are what a planner should skip. Speeds are those of the
shape. Acceptance is what `eps` makes it and says nothing of trained weights; say so beside every
figure. 16 GB; drawn on the GPU, so a minute's work on a CPU takes some seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, COPIES = 8, 4
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS * COPIES,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,
}
#: Rows and columns of a layer's matrices, and the standard deviation times the root of the columns:
#: the residual stream stays near unit scale, and logits deviate by 3, so that they are no ties.
MATRICES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN, 1.0),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM, 0.7),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN, 1.0),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN, 1.0),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE, 0.7),
}
SCALED = ("self_attn.o_proj", "mlp.down_proj")


def write(folder: Path, tokenizer: Path | None, eps: float, seed: int) -> None:
    """One file for the embeddings and one for each original layer with its copies."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    for file in tokenizer.iterdir() if tokenizer else ():
        if file.name.startswith(
            ("tokenizer", "special_tokens", "chat_template", "vocab", "merges")
        ):
            shutil.copy2(file, folder / file.name)
    index: dict[str, str] = {}
    for number, tensors in enumerate(parts(eps, seed)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    listing = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing) + "\n")


def parts(eps: float, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one file after another, bfloat16, on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, deviation: float) -> torch.Tensor:
        values = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return values.normal_(0.0, deviation, generator=generator)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield {
        "model.embed_tokens.weight": draw(VOCABULARY, HIDDEN, 1.0).cpu(),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": draw(VOCABULARY, HIDDEN, 3.0 * HIDDEN**-0.5).cpu(),
    }
    for layer in range(LAYERS):
        drawn = {
            name: draw(rows, columns, scale * columns**-0.5)
            for name, (rows, columns, scale) in MATRICES.items()
        }
        tensors = {}
        for copy in range(COPIES):
            prefix = f"model.layers.{layer * COPIES + copy}"
            for name, matrix in drawn.items():
                scale = eps if copy and name in SCALED else 1.0
                tensors[f"{prefix}.{name}.weight"] = (matrix * scale).cpu()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = ones.clone()
        yield tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder to copy a tokenizer from")
    parser.add_argument("--eps", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.tokenizer, arguments.eps, arguments.seed)
    print(arguments.folder)
