# SPDX-License-Identifier: Apache-2.0
"""Statistics over results: one `Figures` per arm and cell, a summary per arm, CSV.

Ratios are formed round by round against the plain arm that took turns with this one.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knapspec_vllm.bench.arms import PLAIN
from knapspec_vllm.bench.provenance import without_folders
from knapspec_vllm.bench.results import FILE, Measurement, Results, Round, joined

CSV_FILE = "bench.csv"
#: Below this, an arm counts as slower than plain vLLM.
SLOWER = 0.98


@dataclass(frozen=True)
class Figures:
    """One arm in one cell; None where there is nothing to say."""

    arm: str
    batch: int
    context: int
    temperature: float
    rounds: int
    #: Decode tokens per second of the whole batch.
    tokens_per_second: float
    tokens_per_second_p20: float
    tokens_per_second_p80: float
    tokens_per_second_min: float
    tpot_ms: float | None
    ttft_ms: float | None
    #: Of tokens per second, over plain.
    ratio: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    #: Of the fastest rounds.
    ratio_of_minima: float | None
    #: While the batch has all its rows, as in a server that fills it up again.
    ratio_full_batch: float | None
    #: Of the requests' time per output token.
    tpot_ratio: float | None
    #: What KnapSpec predicted for the rounds that it measured.
    predicted: float | None
    #: The same as it turned out: while the batch has all its rows, sums over sums, without the
    #: rounds that solved for plans.
    realised: float | None
    realised_over_predicted: float | None
    acceptance: float | None
    #: Tokens per verified draft, vLLM's own token included.
    accepted_length: float | None
    #: Share of KnapSpec's rounds that drafted.
    drafting: float | None
    identical: int | None
    compared: int | None
    output_tokens: int
    #: Held by the workers; added: over plain's. On a GPU vLLM gives what is left to the KV cache.
    memory_mib: float | None
    memory_added_mib: float | None
    exact: bool
    #: Whether the arm took turns with the plain one it is compared with.
    alternated: bool
    plan: str | None
    draft_length: int | None
    decision: str | None
    #: Medians of the rounds of each start of the engines.
    ratio_by_start: tuple[float, ...] = ()


def all_figures(results: Results) -> list[Figures]:
    """In the order of the cells, then of the arms; plain once a cell."""
    found = []
    for cell in results.cells:
        for arm in results.arms:
            parts = [part for part in results.parts(arm, cell) if part.rounds]
            if parts:
                found.append(_of_starts(parts, [results.baseline(part) for part in parts]))
    return found


def _of_starts(
    parts: Sequence[Measurement], bases: Sequence[tuple[Measurement | None, bool]]
) -> Figures:
    """Of an arm's measurements of one cell, each with its `Results.baseline`."""
    plains = [plain for plain, _ in bases if plain is not None]
    alone = len(plains) < len(parts)
    whole = figures(joined(parts), None if alone else joined(plains), all(b for _, b in bases))
    pairs = zip(parts, plains, strict=not alone)
    ratios = [statistics.median(found) for pair in pairs if (found := _ratios(*pair))]
    return dataclasses.replace(whole, ratio_by_start=tuple(ratios))


def _ratios(mine: Measurement, plain: Measurement) -> list[float]:
    """Of tokens per second over plain's, round by round; none for plain itself."""
    if mine.arm == PLAIN:
        return []
    pairs = zip(mine.rounds, plain.rounds, strict=False)
    return [a.tokens_per_second / b.tokens_per_second for a, b in pairs if b.tokens_per_second > 0]


def figures(mine: Measurement, plain: Measurement | None, alternated: bool = True) -> Figures:
    """Of one measurement. plain: the baseline's of the same cell."""
    speeds = [r.tokens_per_second for r in mine.rounds]
    low, middle, high = spread(speeds)
    ratios: list[float] = []
    best = full_ratio = tpot_ratio = realised = None
    if plain is not None and mine.arm != PLAIN:
        ratios = _ratios(mine, plain)
        best = quotient(max(speeds), max(r.tokens_per_second for r in plain.rounds))
        pairs = list(zip(mine.rounds, plain.rounds, strict=False))
        full_ratio = _median(
            quotient(a.full_tokens_per_second, b.full_tokens_per_second) for a, b in pairs
        )
        kept = [(a, b) for a, b in pairs if not a.solves] or pairs
        realised = quotient(_full_speed(a for a, _ in kept), _full_speed(b for _, b in kept))
        tpot_ratio = _median(quotient(b.tpot_seconds, a.tpot_seconds) for a, b in pairs)
    ratio_low, ratio, ratio_high = spread(ratios) if ratios else (None, None, None)
    state = mine.knapspec or {}
    stats = state.get("stats") or {}
    predicted = quotient(stats.get("predicted_plain_us"), stats.get("predicted_round_us"))
    acceptance, length = accepted(mine)
    same, compared = identical(mine, plain)
    return Figures(
        arm=mine.arm,
        batch=mine.cell.batch,
        context=mine.cell.context,
        temperature=mine.cell.temperature,
        rounds=len(mine.rounds),
        tokens_per_second=middle,
        tokens_per_second_p20=low,
        tokens_per_second_p80=high,
        tokens_per_second_min=min(speeds),
        tpot_ms=_median(_ms(r.tpot_seconds) for r in mine.rounds),
        ttft_ms=_median(_ms(r.ttft_seconds) for r in mine.rounds),
        ratio=ratio,
        ratio_p20=ratio_low,
        ratio_p80=ratio_high,
        ratio_of_minima=best,
        ratio_full_batch=full_ratio,
        tpot_ratio=tpot_ratio,
        predicted=predicted,
        realised=realised,
        realised_over_predicted=quotient(realised, predicted),
        acceptance=acceptance,
        accepted_length=length,
        drafting=quotient(stats.get("drafting_rounds"), stats.get("rounds")),
        identical=same,
        compared=compared,
        output_tokens=sum(r.output_tokens for r in mine.rounds),
        memory_mib=_mib(mine.memory_bytes),
        memory_added_mib=None
        if plain is None or plain.memory_bytes is None or mine.memory_bytes is None
        else _mib(mine.memory_bytes - plain.memory_bytes),
        exact=all(r.exact for r in mine.rounds),
        alternated=alternated,
        plan=state.get("plan"),
        draft_length=state.get("draft_length"),
        decision=state.get("decision"),
    )


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _full_speed(rounds: Iterable[Round]) -> float | None:
    """Tokens per second while the batch has all its rows; None where it never has."""
    pairs = [(r.full_tokens, r.full_seconds) for r in rounds]
    return quotient(float(sum(n for n, _ in pairs)), sum(seconds for _, seconds in pairs))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def quotient(above: float | None, below: float | None) -> float | None:
    """None where either is missing or there is nothing to divide by."""
    return above / below if above is not None and below else None


def accepted(measurement: Measurement) -> tuple[float | None, float | None]:
    """(acceptance, accepted length), by KnapSpec's own counts where it has them.

    vLLM counts as drafted what it schedules for prompts that are fully cached, too.
    """
    stats = (measurement.knapspec or {}).get("stats") or {}
    counters = measurement.counters
    if "draft_tokens" in stats:
        verified = stats.get("drafted_by_position") or []
        drafts = verified[0] if verified else None
        hits, tokens = stats.get("accepted_tokens"), sum(verified)
    else:
        drafts, tokens = counters.get("num_drafts"), counters.get("num_draft_tokens")
        hits = counters.get("num_accepted_tokens")
    per_draft = quotient(hits, drafts if drafts is not None else counters.get("num_drafts"))
    return quotient(hits, tokens), None if per_draft is None else 1 + per_draft


def identical(mine: Measurement, plain: Measurement | None) -> tuple[int | None, int | None]:
    """(requests with plain's tokens, requests compared) at temperature 0."""
    if plain is None or mine.arm == PLAIN or mine.cell.temperature > 0:
        return None, None
    pairs = [
        (a, b)
        for ours, theirs in zip(mine.rounds, plain.rounds, strict=False)
        for a, b in zip(ours.outputs, theirs.outputs, strict=False)
    ]
    return sum(a == b for a, b in pairs), len(pairs)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True)
class Summary:
    """One arm over all its cells."""

    arm: str
    cells: int
    geometric_mean: float
    worst: Figures
    slower: int


def summaries(rows: Sequence[Figures]) -> list[Summary]:
    """Of every arm that was compared with plain, in order."""
    found = []
    for arm in dict.fromkeys(row.arm for row in rows):
        ratios = {row: row.ratio for row in rows if row.arm == arm and row.ratio}
        if ratios:
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios.values()))
            worst = min(ratios, key=lambda row: ratios[row])
            slower = sum(ratio < SLOWER for ratio in ratios.values())
            found.append(Summary(arm, len(ratios), mean, worst, slower))
    return found


def save(results: Results, folder: Path) -> list[Figures]:
    """Write bench.json and bench.csv; the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(results, folder / FILE)
    rows = all_figures(results)
    write_csv(rows, folder / CSV_FILE)
    return rows


def write_json(results: Results, path: Path) -> None:
    """With the figures, for other readers. An interrupted run leaves the old file or the new."""
    rows = [without_folders(dataclasses.asdict(row)) for row in all_figures(results)]
    text = json.dumps({**results.as_dict(), "figures": rows}, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_csv(rows: Sequence[Figures], path: Path) -> None:
    """One row per arm and cell; empty where there is nothing to say."""
    names = [field.name for field in dataclasses.fields(Figures)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(without_folders(dataclasses.asdict(row)) for row in rows)
