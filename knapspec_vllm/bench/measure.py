# SPDX-License-Identifier: Apache-2.0
"""Measurements on a running server: answers, speed, acceptance, and what KnapSpec logged."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from statistics import median

from openai import OpenAI

MODEL_NAME = "demo"  # --served-model-name

_COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)_total(?:\{[^}]*\})? (\S+)$", re.M)
_PLAN = re.compile(
    r"KnapSpec plan: (?P<plan>.+), draft length (?P<length>\d+), "
    r"predicted speedup (?P<speedup>[\d.]+)x"
)
# "no room": a request's last token or two, where nothing is left to draft for.
_DECLINES = re.compile(
    r"KnapSpec declines: (?!no room)(?P<reason>.+?)(?: \(batch \d+, context \d+\))?$", re.M
)


@dataclass(frozen=True)
class SpecCounters:
    """vLLM's own counts of speculative decoding."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def from_metrics(cls, text: str) -> SpecCounters:
        """Sum over engines of a Prometheus page; zeros where speculation is off."""
        found = dict.fromkeys(("drafts", "draft_tokens", "accepted_tokens"), 0)
        for name, value in _COUNTER.findall(text):
            if name in found:
                found[name] += int(float(value))
        return cls(**found)

    def __sub__(self, earlier: SpecCounters) -> SpecCounters:
        return SpecCounters(
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            self.accepted_tokens - earlier.accepted_tokens,
        )

    @property
    def accepted_length(self) -> float | None:
        """Tokens per verified draft, the bonus token included; None without drafts."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None without drafts."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None


@dataclass(frozen=True)
class PlanLog:
    """The last decision of each kind in a server's log; the end of a request is not one."""

    plan: str | None
    draft_length: int
    predicted_speedup: float
    declined: str | None
    ends_declining: bool

    @classmethod
    def from_log(cls, text: str) -> PlanLog:
        plans, declines = list(_PLAN.finditer(text)), list(_DECLINES.finditer(text))
        plan = plans[-1] if plans else None
        decline = declines[-1] if declines else None
        return cls(
            plan=plan["plan"] if plan else None,
            draft_length=int(plan["length"]) if plan else 0,
            predicted_speedup=float(plan["speedup"]) if plan else 1.0,
            declined=decline["reason"].strip() if decline else None,
            ends_declining=decline is not None and (plan is None or decline.start() > plan.start()),
        )


@dataclass
class Arm:
    """Results of one row of the table."""

    name: str
    answers: list[str] = field(default_factory=list)  # one per prompt, of the first round
    rates: list[float] = field(default_factory=list)  # tokens per second, one per round
    changed: int = 0  # answers of later rounds that differ from the first round's
    counters: SpecCounters = SpecCounters()
    log: PlanLog | None = None

    @property
    def tokens_per_second(self) -> float:
        return median(self.rates)

    def identical_to(self, other: Arm) -> int:
        return sum(a == b for a, b in zip(self.answers, other.answers, strict=True))


class Chat:
    """Greedy chat requests to one server, one at a time."""

    def __init__(self, url: str, max_tokens: int) -> None:
        # Retries would be timed as if they were work.
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self._max_tokens = max_tokens

    def ask(self, prompt: str, stream: bool, max_tokens: int | None = None) -> tuple[str, int]:
        """(answer, number of generated tokens)."""
        arguments: dict = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens or self._max_tokens,
        }
        completions = self._client.chat.completions
        if not stream:
            answer = completions.create(**arguments)
            return answer.choices[0].message.content or "", answer.usage.completion_tokens
        text, tokens = "", 0
        options = {"include_usage": True}
        for chunk in completions.create(**arguments, stream=True, stream_options=options):
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        return text, tokens

    def run_round(self, arm: Arm, prompts: list[str], stream: bool) -> None:
        """Ask every prompt once; adds the speed, and the answers or how many of them changed."""
        answers, tokens = [], 0
        start = time.perf_counter()
        for prompt in prompts:
            text, count = self.ask(prompt, stream)
            answers.append(text)
            tokens += count
        arm.rates.append(tokens / (time.perf_counter() - start))
        if arm.answers:
            arm.changed += sum(a != b for a, b in zip(arm.answers, answers, strict=True))
        else:
            arm.answers = answers
