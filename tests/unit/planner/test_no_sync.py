# SPDX-License-Identifier: Apache-2.0
"""The solver and the choice of a plan never wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from knapspec_vllm.planner.solver import (
    ItemWeights,
    Savings,
    SolverSettings,
    run_solver,
    start_solve,
)
from tests.helpers_no_sync import HostSyncError, no_host_sync
from tests.helpers_planner import TorchRunner, random_model

WEIGHTS = ItemWeights(attention_full_us=40.0, attention_window_us=25.0, mlp_us=60.0)
SETTINGS = SolverSettings(bins=8, live_branches=8)


def runner() -> TorchRunner:
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(3))
    return TorchRunner(random_model(1, 6), tokens, reference_tokens=8)


def test_solver_does_not_wait() -> None:
    solved = runner()
    with no_host_sync():
        pending = start_solve(solved, WEIGHTS, SETTINGS)
    assert pending.ready()
    assert pending.result()


def test_shapes_do_not_depend_on_values() -> None:
    """Runs on tensors without values: every branch on a value would raise."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    solved = runner()
    savings = Savings.of(WEIGHTS, solved.num_layers, True, torch.device("cpu"))
    with mode:
        packed = run_solver(solved, solved.reference_states(), savings, SETTINGS)
    assert packed.shape == (4 + 2 * 2 * 6, 9)
    assert packed.dtype is torch.int32


def test_same_numbers_every_time() -> None:
    solved = runner()
    first = start_solve(solved, WEIGHTS, SETTINGS).result()
    assert start_solve(solved, WEIGHTS, SETTINGS).result() == first


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: int(x.sum()),
        lambda x: float(x[0]),
        lambda x: torch.unique(x),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_guard_sees_it(waits) -> None:
    x = torch.arange(4.0)
    with pytest.raises(HostSyncError), no_host_sync():
        waits(x)
