# SPDX-License-Identifier: Apache-2.0
"""The demo's output: answers and one table per model, as plain text."""

from __future__ import annotations

import textwrap

from knapspec_vllm.bench.measure import Arm

COLUMNS = ("", "tokens/s", "speed", "accepted length", "acceptance", "identical", "decision")
WIDTHS = (20, 8, 6, 8, 10, 9, 46)


def table(arms: list[Arm]) -> str:
    """`arms[0]` is plain vLLM; cells wrap at `WIDTHS`."""
    rows = [COLUMNS, *(_row(arm, arms[0]) for arm in arms)]
    rule = "-+-".join("-" * width for width in WIDTHS)
    blocks = [_wrapped(row) for row in rows]
    return "\n".join([blocks[0], rule, f"\n{rule}\n".join(blocks[1:])])


def _row(arm: Arm, plain: Arm) -> tuple[str, ...]:
    ratio = arm.tokens_per_second / plain.tokens_per_second
    length, rate = arm.counters.accepted_length, arm.counters.acceptance_rate
    return (
        arm.name,
        f"{arm.tokens_per_second:.1f}",
        f"{ratio:.2f}x",
        "-" if length is None else f"{length:.2f}",
        "-" if rate is None else f"{rate:.0%}",
        "-" if arm is plain else f"{arm.identical_to(plain)} of {len(plain.answers)}",
        decision(arm),
    )


def decision(arm: Arm) -> str:
    """What KnapSpec did in this arm and why, in words."""
    log = arm.log
    if log is None:
        return "no speculation"
    plan = ""
    if log.plan is not None:
        plan = (
            f"{log.plan}; {log.draft_length} tokens a round, predicted {log.predicted_speedup:.2f}x"
        )
    if log.ends_declining:
        declined = f"declines: {log.declined}"
        # A plan may have run first and lost its case.
        return f"{declined} (before: {plan})" if plan and arm.counters.drafts else declined
    return plan or ("drafted, but logged no plan" if arm.counters.drafts else "logged nothing")


def _wrapped(cells: tuple[str, ...]) -> str:
    columns = [
        textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, WIDTHS, strict=True)
    ]
    height = max(map(len, columns))
    lines = []
    for i in range(height):
        parts = [
            (column[i] if i < len(column) else "").ljust(width)
            for column, width in zip(columns, WIDTHS, strict=True)
        ]
        lines.append(" | ".join(parts).rstrip())
    return "\n".join(lines)


def answers(arms: list[Arm], prompts: list[str]) -> str:
    """Every prompt with plain vLLM's answer, and each arm's where it differs."""
    lines = []
    for i, prompt in enumerate(prompts):
        lines.append(f"  > {prompt}")
        lines.append(_quoted(arms[0].answers[i]))
        for arm in arms[1:]:
            if arm.answers[i] != arms[0].answers[i]:
                lines.append(f"    differs under {arm.name}:")
                lines.append(_quoted(arm.answers[i]))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    flat = " ".join(text.split())
    return textwrap.fill(flat, 100, initial_indent="    ", subsequent_indent="    ")


def notes(arms: list[Arm], dtype: str) -> str:
    """What a reader needs to read the table right."""
    result = [
        "tokens/s: median over rounds of the same prompts, one request at a time, once warm.",
        "accepted length: tokens per verified draft, vLLM's bonus token included.",
    ]
    differ = any(arm.identical_to(arms[0]) < len(arms[0].answers) for arm in arms)
    if dtype != "float32" and differ:
        result.append(
            f"Differing answers: in {dtype} vLLM rounds differently when it verifies many tokens "
            "at once, and a near-tie may fall the other way; in float32 they should all agree."
        )
    if any(arm.changed for arm in arms):
        changed = ", ".join(f"{arm.name}: {arm.changed}" for arm in arms if arm.changed)
        result.append(f"Answers that changed between the rounds of one server: {changed}.")
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in result)
