# SPDX-License-Identifier: Apache-2.0
"""One item of the solver: `dp_relax` reads every stream once, `gather_branches` copies a third.

In a solve the streams have just been written, so that up to some 40 MB of them are still in an
H100's L2 cache; here they come from memory.
"""

from typing import Any

import torch
from harness import Case, bench_device, is_toy, report

from knapspec_vllm import ops
from knapspec_vllm.kernels.reference import dp_relax as eager

# (branches, tokens, d): the default number of branches on models of 135M, 8B and 70B parameters,
# one token, and more branches than anybody should ask for
SIZES = [(33, 32, 576), (33, 64, 4096), (33, 64, 8192), (33, 1, 4096), (341, 32, 4096)]
TOY_SIZES = [(5, 3, 64)]
SETTINGS: dict[str, Any] = {"prune_cosine": 0.5, "max_saving": 0.75, "exchange_rate": 0.1}


def cases(number: int, tokens: int, dim: int, windowed: bool) -> list[Case]:
    device = bench_device()
    target = torch.randn(tokens, dim, device=device)
    noise = torch.rand(3, number, 1, 1, device=device) * torch.randn(
        3, number, tokens, dim, device=device
    )
    full, window, skip = (target + noise).to(torch.bfloat16).unbind()
    streams = (full, window if windowed else None, skip)
    saved = 0.5 * torch.rand(number, device=device)
    alive = torch.ones(number, dtype=torch.bool, device=device)
    inputs = (*streams, saved, alive, torch.tensor([0.0, 0.005, 0.01], device=device))
    settings = {**SETTINGS, "rows_out": number}
    rows = ops.dp_relax(*inputs, **settings).rows
    name = f"N{number}-R{tokens}-d{dim}-{'attention' if windowed else 'mlp'}"
    return [
        Case(
            f"relax-{name}",
            lambda: ops.dp_relax(*inputs, **settings),
            moved_bytes=full.nbytes * (2 + windowed),
            flops=7 * full.numel() * (2 + windowed),
            baselines={"eager": lambda: eager.dp_relax(*inputs, **settings)},
        ),
        Case(
            f"gather-{name}",
            lambda: ops.gather_branches(*streams, rows),
            # Rows that are not alive all read the target.
            moved_bytes=full.nbytes + full[0].nbytes * len(rows.unique()),
            baselines={"eager": lambda: eager.gather_branches(*streams, rows)},
        ),
    ]


if __name__ == "__main__":
    sizes = TOY_SIZES if is_toy() else SIZES
    report("dp_relax", [c for size in sizes for kind in (True, False) for c in cases(*size, kind)])
