# SPDX-License-Identifier: Apache-2.0
"""How often calibration times a shape, which of the times it keeps, and that ranks agree on it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knapspec_vllm.calibration import budget, faster, profiler
from knapspec_vllm.calibration.cells import measured_rows
from knapspec_vllm.calibration.steadiness import unsteadiness
from knapspec_vllm.planner.costs import CostSample


@pytest.mark.parametrize(
    ("seconds", "hurry", "kept"),
    [
        # The first of a shape prepares kernels: it does not count where there is time for more.
        ([9.0, 2.0, 3.0, 4.0], math.inf, [2.0, 3.0, 4.0]),
        # Out of time there is one more than the first; a slow moment in either is not the price.
        ([9.0, 2.0], 0.0, [2.0]),
        ([2.0, 9.0], 0.0, [2.0]),
        # Time runs out in the third.
        ([9.0, 2.0, 3.0], 12.0, [2.0, 3.0]),
    ],
)
def test_times_of_a_shape(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], hurry: float, kept: list[float]
) -> None:
    clock, left = [0.0], list(seconds)

    def run() -> tuple[torch.Tensor, ...]:
        clock[0] += left.pop(0)
        return ()

    monkeypatch.setattr(profiler, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    engine: Any = SimpleNamespace(synchronize=lambda: None, runs_ahead=False)
    found = profiler.time_us(engine, run, lambda: clock[0] >= hurry)
    assert [time_us / 1e6 for time_us in found] == pytest.approx(kept)
    assert not left


@pytest.mark.parametrize(("ahead", "expected"), [(False, 2.0 + 3.0), (True, 3.0)])
def test_a_host_that_runs_ahead_is_hidden(
    monkeypatch: pytest.MonkeyPatch, ahead: bool, expected: float
) -> None:
    """Two seconds of the host's for three of the device's, which are read back only where rounds
    read them."""
    host, device, read = [0.0], [0.0], []

    class Found:
        def tolist(self) -> None:
            read.append(True)

    def run() -> Any:
        host[0] += 2.0
        device[0] = max(device[0], host[0]) + 3.0
        return (Found(),)

    def synchronize() -> None:
        host[0] = max(host[0], device[0])

    monkeypatch.setattr(profiler, "time", SimpleNamespace(perf_counter=lambda: host[0]))
    engine: Any = SimpleNamespace(synchronize=synchronize, runs_ahead=ahead)
    found = profiler.once_us(engine, run) / 1e6
    # The first of those in a row is not hidden.
    assert found == pytest.approx(expected, rel=2.0 / (3.0 * profiler._AHEAD) if ahead else 1e-6)
    assert bool(read) is not ahead


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([[100.0, 100.0, 100.0]], 1.0),
        # By the price, the median: one slow moment of three is none of it.
        ([[100.0, 110.0, 900.0]], 1.1),
        # Most shapes decide, however bad the others are.
        ([[100.0, 105.0, 110.0], [100.0, 700.0, 900.0], [100.0, 102.0, 300.0]], 1.05),
        ([[100.0, 150.0, 170.0], [40.0, 80.0, 90.0], [10.0, 10.0, 10.0]], 1.5),
        # Timed once, in a hurry: nothing to be told.
        ([[100.0], [300.0]], None),
        ([[100.0], [10.0, 20.0, 20.0]], 2.0),
    ],
)
def test_unsteadiness(shapes: list[list[float]], expected: float | None) -> None:
    samples = [
        CostSample("step", 1 + number, 1, 100, time_us)
        for number, times in enumerate(shapes)
        for time_us in times
    ]
    assert unsteadiness(samples) == (None if expected is None else pytest.approx(expected))


def test_flashinfer_drafts_with_our_kernel() -> None:
    flashinfer = SimpleNamespace(get_name=lambda: "FLASHINFER")
    engine: Any = SimpleNamespace(
        device=torch.device("cuda"),
        paged_kv=(object(),),
        attention_groups=(SimpleNamespace(backend=flashinfer),),
    )
    drafter: Any = None
    assert faster.faster_attention(engine, drafter, 8) == "kernel"
    engine.paged_kv = ()  # which it then cannot read
    assert faster.faster_attention(engine, drafter, 8) == "backend"


def test_measured_rows() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device in (cpu, gpu):
        assert measured_rows(1, device) == [1]
        assert measured_rows(7, device) == [1, 2, 4]
    assert measured_rows(32, cpu) == measured_rows(256, cpu)
    assert measured_rows(1024, cpu)[-1] == 32
    assert measured_rows(1024, gpu)[-1] == 256


@pytest.mark.parametrize(("fails", "alone"), [(2, True), (2, False), (0, True)])
def test_a_shape_that_finds_no_memory_is_the_last(
    monkeypatch: pytest.MonkeyPatch, fails: int, alone: bool
) -> None:
    """A server that would have started without KnapSpec must start with it."""
    measured: list[Any] = []

    def cell(engine: Any, drafter: Any, tokens: int, cell: Any, budget: Any) -> list[Any]:
        if len(measured) == fails:
            raise torch.OutOfMemoryError("no more")
        measured.append(cell)
        return [cell]

    monkeypatch.setattr(profiler, "_measure_cell", cell)
    engine: Any = SimpleNamespace(
        max_model_len=8192, num_blocks=4096, block_size=16, device=torch.device("cpu")
    )
    agreement: Any = SimpleNamespace(share=lambda value: value, alone=alone)
    drafter: Any = None

    def measure() -> list[Any]:
        return profiler.measure(engine, drafter, 4, 8, budget.Budget(30.0, agreement))

    if fails and alone:
        assert measure() == measured
    else:
        with pytest.raises(torch.OutOfMemoryError):
            measure()
    assert len(measured) == fails


def test_ranks_measure_the_same_by_the_first_ranks_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps hold collectives: a rank that measured one more would wait in them forever."""
    said: list[Any] = []

    def measured(second: float, agreement: Any) -> tuple[int, list[list[float]]]:
        """Shapes of a rank on which a repetition takes so long."""
        clock = [0.0]

        def run() -> tuple[torch.Tensor, ...]:
            clock[0] += second
            return ()

        def cell(engine: Any, drafter: Any, tokens: int, cell: Any, budget: Any) -> list[Any]:
            return [profiler.time_us(engine, run, budget.half_gone) for _ in range(2)]

        for module in (budget, profiler):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        monkeypatch.setattr(profiler, "_measure_cell", cell)
        engine: Any = SimpleNamespace(
            synchronize=lambda: None,
            runs_ahead=False,
            max_model_len=8192,
            num_blocks=4096,
            block_size=16,
            device=torch.device("cpu"),
        )
        drafter: Any = None
        found: list[Any] = profiler.measure(engine, drafter, 4, 8, budget.Budget(30.0, agreement))
        return len(found), [len(times) for times in found]

    def lead(value: Any) -> Any:
        said.append(value)
        return value

    def follow(value: Any) -> Any:
        return said.pop(0)

    first = measured(1.0, SimpleNamespace(share=lead))
    assert 2 < first[0] < 16  # the time was up, and some shapes were measured in a hurry
    assert {1, 3} <= set(first[1])
    assert measured(5.0, SimpleNamespace(share=follow)) == first
    assert not said
