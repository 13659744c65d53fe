# SPDX-License-Identifier: Apache-2.0
"""Latency of `plan_tpt`: a few kilobytes in one program, so microseconds and not bandwidth count.

Beside the eager twin on the same device, the same decision by `Policy` on the host is timed: twice,
with its cached table and without, as after a change of batch or acceptance. The host's times leave
out the wait for the context lengths, which the op is there to avoid.
"""

import statistics
import time

import torch
from harness import Case, bench_device, is_toy, report

from knapspec_vllm import ops
from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.kernels.reference.plan_tpt import plan_tpt as eager
from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.curves import Curve
from knapspec_vllm.planner.device_choice import curve_tables
from knapspec_vllm.planner.policy import Policy
from knapspec_vllm.planner.types import Batch, Frontier, Mode, Plan, PlanEstimate

LAYERS = 32
CONTEXT = 4096
# (plans, longest draft, rows): the default number of bins at three batches, and the largest setting
SIZES = [(32, 8, 1), (32, 8, 64), (32, 8, 1024), (1024, 32, 64)]
TOY_SIZES = [(4, 4, 2)]


def cost_model() -> CostModel:
    """Curves as long as calibration makes them."""
    rows = (1, 2, 4, 8, 16, 32)

    def curve(time_us: float, token_us: float) -> Curve:
        base = tuple(time_us * (1 + 0.02 * n) for n in rows)
        return Curve(rows, base, tuple(token_us * n for n in rows))

    steps = tuple((tokens, curve(5000 + 20 * tokens, 0.01)) for tokens in (1, 2, 3, 5, 9))
    attention, window, mlp = curve(60, 3e-4), curve(50, 3e-4), curve(90, 0.0)
    return CostModel(LAYERS, 576, steps, curve(300, 0.0), attention, window, mlp)


def estimates(plans: int) -> tuple[PlanEstimate, ...]:
    """Distinct plans: the bits of their index say which attentions skip, the rest windows."""

    def modes(index: int) -> list[Mode]:
        skips = [index >> layer & 1 for layer in range(LAYERS)]
        pairs = ((Mode.SKIP if skip else Mode.WINDOW, Mode.FULL) for skip in skips)
        return [mode for pair in pairs for mode in pair]

    return tuple(PlanEstimate(Plan(tuple(modes(n))), 0.9, 56, 64) for n in range(plans))


def case(plans: int, longest: int, rows: int) -> Case:
    device = bench_device()

    def upload(*values: float) -> torch.Tensor:
        return torch.tensor(values, device=device)

    curves = curve_tables(cost_model(), device)
    inputs = (
        torch.randint(0, LAYERS // 2, (plans, 3), device=device).float(),
        torch.rand(2, plans, device=device),
        torch.full((rows,), CONTEXT, dtype=torch.int32, device=device),
        upload(1.0, 1.0, 1.0, 200.0, 0.9),
        upload(0.03, 1.1, 1.05),
        torch.tensor([0, min(4, longest)], dtype=torch.int32, device=device),
    )
    size = sum(tensor.nbytes for tensor in (*inputs, curves.segments, curves.first, curves.tokens))
    return Case(
        f"P{plans}-G{longest}-B{rows}",
        lambda: ops.plan_tpt(curves, *inputs, max_draft_length=longest),
        moved_bytes=size + 4 * plans * longest + 12,
        baselines={"eager": lambda: eager(curves, *inputs, max_draft_length=longest, paper=False)},
    )


def policy_us(plans: int, longest: int, rows: int) -> tuple[float, float]:
    """Median of `Policy.choose` on the host with its table cached, and without."""
    costs, config = cost_model(), KnapSpecConfig()
    acceptance = AcceptanceModel(config.prior_weight, config.feedback_half_life)
    policy = Policy(config, costs, acceptance, longest, LAYERS)
    policy.set_frontier(Frontier(estimates(plans), CONTEXT, 1, "solved"))
    batch = Batch(rows, rows * CONTEXT)
    found = []
    for changed in (False, True):
        times = []
        for _ in range(30):
            acceptance.version += changed
            start = time.perf_counter()
            policy.choose(batch, longest)
            times.append((time.perf_counter() - start) * 1e6)
        found.append(statistics.median(times[1:]))
    return found[0], found[1]


if __name__ == "__main__":
    sizes = TOY_SIZES if is_toy() else SIZES
    for row in report("plan_tpt", [case(*size) for size in sizes]):
        timing = {
            key: value * 1e3 for key, value in row["ms"].items() if key not in ("runs", "graph")
        }
        print(
            f"{row['case']}: {timing['median']:.1f} us ({timing['p20']:.1f}..{timing['p80']:.1f})"
        )
    for size in sizes:
        print("Policy on the host, P{}-G{}-B{}:".format(*size),
              "{:.0f} us cached, {:.0f} us new".format(*policy_us(*size)))  # fmt: skip
