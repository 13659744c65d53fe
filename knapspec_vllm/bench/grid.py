# SPDX-License-Identifier: Apache-2.0
"""The measurement itself: arms in turn, round by round, cell by cell."""

from __future__ import annotations

import collections
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from knapspec_vllm.bench.arms import PLAIN
from knapspec_vllm.bench.counters import total
from knapspec_vllm.bench.engines import Engine, running
from knapspec_vllm.bench.results import Cell, Measurement, Results, Round, later

T = TypeVar("T")


@dataclass(frozen=True)
class Protocol:
    """How a cell is measured. requests: at least this many a round, in batches of the cell."""

    rounds: int = 5
    #: Of every engine; each has its share of the rounds.
    starts: int = 1
    warm_up: int = 1
    tokens: int = 128
    requests: int = 2
    #: Requests end at their end-of-text token; else all produce `tokens` tokens.
    natural_end: bool = False
    #: Seconds after which the next arm works, in the middle of a batch; 0: after whole rounds.
    turn: float = 0.0

    def rows(self, cell: Cell) -> int:
        """Requests of a round: whole batches."""
        return cell.batch * -(-self.requests // cell.batch)

    def sampling(self, cell: Cell) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams."""
        return {
            "temperature": cell.temperature,
            "max_tokens": self.tokens,
            "ignore_eos": not self.natural_end,
        }

    def rounds_of(self, start: int) -> range:
        """Numbers of the rounds that engines of this start measure."""
        return range(self.rounds * start // self.starts, self.rounds * (start + 1) // self.starts)


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The same order begun at another place each turn, so that every arm is first now and then."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def groups(names: Sequence[str], at_once: int) -> list[list[str]]:
    """Arms that stand side by side; every group has plain, so that it has its own baseline.

    With room for a single engine each is alone, plain first.
    """
    others = [name for name in names if name != PLAIN]
    if at_once < 2:
        return [[PLAIN], *([name] for name in others)]
    step = at_once - 1
    return [[PLAIN, *others[i : i + step]] for i in range(0, len(others), step)] or [[PLAIN]]


def take_turns(engines: Sequence[Engine], request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every engine's answer to the request. One works at a time, and is last after its turn."""
    answers = {}
    waiting = collections.deque((engine, request) for engine in engines)
    while waiting:
        engine, what = waiting.popleft()
        answer = engine.turn(what)
        if answer is None:
            waiting.append((engine, {}))
        else:
            answers[engine.name] = answer
    return answers


def measure_cell(
    engines: Sequence[Engine],
    cell: Cell,
    protocol: Protocol,
    prompts: Callable[[int], list[list[int]]],
    session: int = 0,
    start: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Every round runs all engines in turn, one at a time, on the same prompts.

    prompts: those of a round; warm-up rounds have negative numbers.
    """
    request = {
        "batch": cell.batch,
        "sampling": protocol.sampling(cell),
        "turn": protocol.turn,
    }
    rounds: dict[str, list[Round]] = {engine.name: [] for engine in engines}
    counters: dict[str, Any] = {}
    states: dict[str, dict[str, Any] | None] = {engine.name: None for engine in engines}
    memory: dict[str, int | None] = {}
    for number in (*range(-protocol.warm_up, 0), *protocol.rounds_of(start)):
        answers = take_turns(rotated(engines, number), {**request, "prompts": prompts(number)})
        for name, answer in answers.items():
            if number < 0:
                continue
            solves = ((answer["knapspec"] or {}).get("stats") or {}).get("solves", 0)
            rounds[name].append(Round.of(answer["batches"], solves))
            counters[name] = total(counters.get(name, {}), answer["counters"])
            states[name] = later(states[name], answer["knapspec"])
            memory[name] = answer.get("memory_bytes")
        if number >= 0:
            speeds = ", ".join(
                f"{e.name} {rounds[e.name][-1].tokens_per_second:.1f}" for e in engines
            )
            say(f"  round {number + 1} of {protocol.rounds}: {speeds} tokens/s")
    return [
        Measurement(
            e.name,
            cell,
            session,
            tuple(rounds[e.name]),
            counters[e.name],
            states[e.name],
            memory[e.name],
        )
        for e in engines
    ]


def measure_grid(
    results: Results,
    protocol: Protocol,
    at_once: int,
    make_engines: Callable[[Sequence[str]], list[Engine]],
    prompts: Callable[[Cell, int], list[list[int]]],
    after_cell: Callable[[Cell, list[Measurement]], None],
    say: Callable[[str], None],
) -> None:
    """Measure what `results` lacks, add it there, and call `after_cell` after each cell."""

    def missing(name: str, start: int) -> list[Cell]:
        return [cell for cell in results.cells if len(results.parts(name, cell)) <= start]

    last = protocol.starts - 1
    lacking = [name for name in results.arms if missing(name, last)]
    begun = time.monotonic()
    for group, start in itertools.product(groups(lacking, at_once), range(protocol.starts)):
        judged = [name for name in group if name != PLAIN or group == [PLAIN]]
        of_arm = {name: missing(name, start) for name in judged}
        todo = [cell for cell in results.cells if any(cell in cells for cells in of_arm.values())]
        if not todo:
            continue
        engines = make_engines(group)
        session = results.next_session
        with running(engines):
            for engine in engines:
                results.arms[engine.name]["engine"] = engine.facts
            for number, cell in enumerate(todo, 1):
                minutes = (time.monotonic() - begun) / 60
                say(f"cell {number} of {len(todo)}: {cell} ({minutes:.1f} min so far)")
                there = [e for e in engines if e.name == PLAIN or cell in of_arm[e.name]]
                of_cell = functools.partial(prompts, cell)
                found = measure_cell(there, cell, protocol, of_cell, session, start, say)
                results.measurements += found
                after_cell(cell, found)
