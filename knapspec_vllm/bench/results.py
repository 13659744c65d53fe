# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measured, as it lies in bench.json; statistics over it are in `figures`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knapspec_vllm.bench.arms import PLAIN, UsageError
from knapspec_vllm.bench.counters import total
from knapspec_vllm.bench.provenance import without_folders

FORMAT = 1
FILE = "bench.json"


@dataclass(frozen=True)
class Cell:
    """One point of the grid: rows of a batch, prompt tokens of a row, sampling temperature."""

    batch: int
    context: int
    temperature: float = 0.0

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}, temperature {self.temperature:g}"


@dataclass(frozen=True)
class Round:
    """One counted round of one arm: all requests of the cell, `batch` at a time."""

    #: Wall clock of the timed passes, as the caller of LLM.generate sees it.
    seconds: float
    #: From the first token of a batch's last row to its last step but one; summed over batches.
    decode_seconds: float
    decode_tokens: int
    #: The same up to the last step before a row ends; 0 where one ends before the last one begins.
    full_seconds: float
    full_tokens: int
    output_tokens: int
    #: From first to last token per token, mean over requests: what clients call it. A request's
    #: first draft chain is not in it but in its time to first token.
    tpot_seconds: float | None
    #: Median over requests that arrive together with nothing of them cached; None if cached.
    ttft_seconds: float | None
    #: Digest of each request's tokens.
    outputs: tuple[str, ...]
    #: False: the engine gave no time stamps; decode_seconds is `seconds`, rest of prefill included.
    exact: bool = True
    #: For plans, of KnapSpec.
    solves: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def full_tokens_per_second(self) -> float | None:
        return self.full_tokens / self.full_seconds if self.full_seconds > 0 else None

    @classmethod
    def of(cls, batches: Sequence[dict[str, Any]], solves: int = 0) -> Round:
        """From a worker's answer: one entry per batch, see `worker.run_batch`."""
        requests = [request for batch in batches for request in batch["requests"]]
        output_tokens = sum(len(request["tokens"]) for request in requests)
        seconds = sum(batch["seconds"] for batch in batches)
        cold = [r["ttft"] for r in requests if r["ttft"] is not None and not r["cached"]]
        per_token = [
            (request["last"] - request["first"]) / (len(request["tokens"]) - 1)
            for request in requests
            if request["last"] and request["first"] and len(request["tokens"]) > 1
        ]
        decode = [batch["decode"] for batch in batches if batch.get("decode")]
        full = [batch["full"] for batch in batches if batch.get("full")]
        exact = len(decode) == len(batches)
        return cls(
            seconds=seconds,
            decode_seconds=sum(time for time, _ in decode) if exact else seconds,
            decode_tokens=sum(tokens for _, tokens in decode) if exact else output_tokens,
            full_seconds=sum(time for time, _ in full),
            full_tokens=sum(tokens for _, tokens in full),
            output_tokens=output_tokens,
            tpot_seconds=statistics.fmean(per_token) if per_token else None,
            ttft_seconds=statistics.median(cold) if cold and len(cold) == len(requests) else None,
            outputs=tuple(digest(request["tokens"]) for request in requests),
            exact=exact,
            solves=solves,
        )


def digest(tokens: Sequence[int]) -> str:
    """Short, and equal for equal tokens."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Measurement:
    """One arm in one cell. Counters are differences over the counted rounds' timed passes."""

    arm: str
    cell: Cell
    #: Arms of one session stood side by side and took turns.
    session: int
    rounds: tuple[Round, ...]
    #: vLLM's own spec_decode counters.
    counters: dict[str, Any] = field(default_factory=dict)
    #: `KnapSpecProposer.snapshot()` at the end, with differences as its "stats".
    knapspec: dict[str, Any] | None = None
    #: Held after the last round: by the workers' processes on a CPU, by their torch on a GPU.
    memory_bytes: int | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        rounds = [{**r, "outputs": tuple(r["outputs"])} for r in values["rounds"]]
        return cls(
            **{
                **values,
                "cell": Cell(**values["cell"]),
                "rounds": tuple(Round(**r) for r in rounds),
            }
        )


def joined(parts: Sequence[Measurement]) -> Measurement:
    """One arm's measurements of one cell, in several starts of its engine, as one."""
    first = parts[0]
    for part in parts[1:]:
        first = dataclasses.replace(
            first,
            rounds=first.rounds + part.rounds,
            counters=total(first.counters, part.counters),
            knapspec=later(first.knapspec, part.knapspec),
            memory_bytes=part.memory_bytes,
        )
    return first


def later(before: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any] | None:
    """The newer of two states of KnapSpec, with the counters of both."""
    if before is None or now is None:
        return now
    return {**now, "stats": total(before.get("stats", {}), now.get("stats", {}))}


@dataclass
class Results:
    """A whole run. settings and arms decide whether a run may go on in the same folder."""

    provenance: dict[str, Any]
    settings: dict[str, Any]
    #: Name -> {"speculative_config": ..., "engine": what the engine said of itself}.
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def parts(self, arm: str, cell: Cell) -> list[Measurement]:
        """The arm's measurements of the cell, one per start of its engine."""
        return [m for m in self.measurements if m.arm == arm and m.cell == cell]

    def whole(self) -> list[Measurement]:
        """One measurement per arm and cell, in the order in which they began."""
        keys = dict.fromkeys((m.arm, m.cell) for m in self.measurements)
        return [joined(self.parts(arm, cell)) for arm, cell in keys]

    def baseline(self, measurement: Measurement) -> tuple[Measurement | None, bool]:
        """(plain vLLM's measurement to compare with, whether the two took turns)."""
        plains = self.parts(PLAIN, measurement.cell)
        beside = [m for m in plains if m.session == measurement.session]
        if beside:
            return beside[0], True
        start = self.parts(measurement.arm, measurement.cell).index(measurement)
        return (plains[min(start, len(plains) - 1)] if plains else None), False

    @property
    def next_session(self) -> int:
        return 1 + max((m.session for m in self.measurements), default=-1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without folders of the machine."""
        return {"format": FORMAT, **without_folders(dataclasses.asdict(self))}

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Raises UsageError where the folder holds no results that this version can read."""
        path = folder / FILE
        if not path.is_file():
            raise UsageError(f"{folder}: there is no {FILE} in it")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise UsageError(f"{path} has format {values['format']}, this reads {FORMAT}")
            return cls(
                provenance=values["provenance"],
                settings=values["settings"],
                arms=values["arms"],
                left_out=values["left_out"],
                cells=[Cell(**cell) for cell in values["cells"]],
                measurements=[Measurement.from_dict(m) for m in values["measurements"]],
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a benchmark's result: {error!r}") from None

    def check_same(self, other: Results) -> None:
        """Raises UsageError naming the first difference that forbids going on with `self`."""
        settings = {"starts": 1, "turn": 0.0, **self.settings}  # older runs had no such settings
        pairs = [
            *((f"setting {name}", settings, other.settings, name) for name in other.settings),
            *(
                (name, self.provenance, other.provenance, name)
                for name in ("git", "device", "cores", "versions", "environment")
            ),
            *((f"arm {name}", self.arms, other.arms, name) for name in other.arms),
        ]
        for what, mine, theirs, name in pairs:
            if name not in mine and mine is self.arms:
                continue  # a new arm
            before, now = (_comparable(values.get(name)) for values in (mine, theirs))
            if before != now:
                raise UsageError(f"--resume: {what} was {before}, now it is {now}")


def _comparable(value: Any) -> Any:
    """As it would come back from the file; an engine's own facts are none of the question."""
    if isinstance(value, dict) and "speculative_config" in value:
        value = {name: part for name, part in value.items() if name != "engine"}
    return json.loads(json.dumps(without_folders(value)))
