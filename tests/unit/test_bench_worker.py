# SPDX-License-Identifier: Apache-2.0
"""What the worker asks of vLLM and counts, over a stand-in for vllm.LLM."""

from __future__ import annotations

import functools
import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm.bench import trace, worker
from knapspec_vllm.bench.inspection import (
    knapspec_snapshot,
    knapspec_stood_still,
    worker_memory,
)
from knapspec_vllm.bench.trace import Turns


class FakeEngine:
    """Steps like LLMEngine: every step gives each row a token, the second row from step 2 on."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.output_processor = SimpleNamespace(request_states={})

    def step(self) -> list[Any]:
        self.clock += 1.0
        first = min(self.output_processor.request_states)
        finished = []
        for name, state in list(self.output_processor.request_states.items()):
            stats = state.stats
            if name != first and state.late:
                state.late = False
                continue
            stats.num_generation_tokens += 1
            stats.first_token_ts = stats.first_token_ts or self.clock
            stats.first_token_latency = stats.first_token_latency or 0.5
            stats.last_token_ts = self.clock
            if stats.num_generation_tokens == state.most:
                finished.append(state)
                del self.output_processor.request_states[name]
        return finished


class FakeLLM:
    def __init__(self, drafter: Any = None) -> None:
        self.llm_engine = FakeEngine()
        self.worker = SimpleNamespace(model_runner=SimpleNamespace(drafter=drafter))
        self.calls: list[dict[str, Any]] = []
        self.drafts = 0

    def generate(self, requests: list[dict], params: dict, use_tqdm: bool) -> list[Any]:
        self.calls.append({"rows": len(requests), **params})
        states = []
        for number in range(len(requests)):
            stats = SimpleNamespace(
                num_generation_tokens=0, first_token_ts=0.0, last_token_ts=0.0,
                first_token_latency=0.0,
            )  # fmt: skip
            states.append(SimpleNamespace(stats=stats, most=params["max_tokens"], late=number > 0))
            self.llm_engine.output_processor.request_states[number] = states[-1]
        while self.llm_engine.output_processor.request_states:
            self.llm_engine.step()
            self.drafts += 1
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[9] * state.stats.num_generation_tokens)],
                prompt_token_ids=request["prompt_token_ids"],
                num_cached_tokens=0,
                metrics=state.stats,
            )
            for request, state in zip(requests, states, strict=True)
        ]

    def get_metrics(self) -> list[Any]:
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        return [
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=self.drafts),
            SimpleNamespace(name=name, values=[2 * self.drafts, self.drafts]),
            SimpleNamespace(name="vllm:num_requests_running", value=3.0),
        ]

    def collective_rpc(self, function: Any) -> list[str]:
        if function is worker_memory:
            assert int(function(self.worker)) > 0
            return ["100", "50"]
        return [function(self.worker), "of another rank"]


class FakeProposer:
    """Counts everything up by one each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def snapshot(self) -> dict[str, Any]:
        self.asked += 1
        return {"decision": f"number {self.asked}", "stats": {"rounds": self.asked, "by": [5]}}


@pytest.fixture(autouse=True)
def _no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))


def test_a_round() -> None:
    llm: Any = FakeLLM(FakeProposer())
    sampling = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    answer = worker.run_round(llm, prompts=[[1, 2], [3, 4], [5, 6]], batch=2, sampling=sampling)
    # Each batch fills the prefix cache first.
    assert [(call["rows"], call["max_tokens"]) for call in llm.calls] == [
        (2, 1), (2, 4), (1, 1), (1, 4),
    ]  # fmt: skip
    first, second = answer["batches"]
    # The second row begins one step late and ends one step late.
    assert first["decode"] == [2.0, 7 - 3]
    assert first["full"] == [1.0, 2]
    assert second["decode"] == [2.0, 2]
    assert [request["tokens"] for request in first["requests"]] == [[9] * 4] * 2
    assert first["requests"][0]["last"] - first["requests"][0]["first"] == 3.0
    assert first["requests"][0]["ttft"] == 0.5
    assert not first["requests"][0]["cached"]
    # Timed passes only: five steps, then four.
    assert answer["counters"] == {"num_drafts": 9, "num_accepted_tokens_per_pos": [18, 9]}
    # Asked before and after each pass: one apart, twice.
    assert answer["knapspec"] == {"decision": "number 4", "stats": {"rounds": 2, "by": [0]}}
    assert answer["memory_bytes"] == 150


@pytest.mark.parametrize("drafter", [None, SimpleNamespace(snapshot=None)])
def test_arms_without_knapspec(drafter: Any) -> None:
    llm: Any = FakeLLM(drafter)
    answer = worker.run_round(llm, prompts=[[1]], batch=1, sampling={"max_tokens": 2})
    assert answer["knapspec"] is None


def test_snapshot_of_a_worker_of_another_kind() -> None:
    assert knapspec_snapshot(SimpleNamespace()) == "null"
    knapspec_stood_still(SimpleNamespace())  # nothing to tell


def test_between_turns_an_engine_waits_and_knapspec_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "_LEAST_STEPS", 1)
    told: list[str] = []
    llm: Any = FakeLLM(SimpleNamespace(stood_still=lambda: told.append("stood still")))
    answers = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}\n{}\n"))
    worker._next_turn(llm, answers)
    assert json.loads(answers.getvalue()) == {"turn": "over"}
    turns = Turns(1e-9, functools.partial(worker._next_turn, llm, answers))
    with pytest.raises(EOFError, match="ended in the middle"):
        worker.run_round(llm, [[1]], 1, {"max_tokens": 3}, turns)
    assert answers.getvalue().count("over") == 3
    assert told == ["stood still"] * 2
