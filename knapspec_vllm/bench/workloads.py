# SPDX-License-Identifier: Apache-2.0
"""Prompts of exact token lengths from text that every Python installation has.

docs    the reference manual's topics            code    the standard library's sources
chat    a question after a passage of docs       mixed   the three in turn, row by row
Every prompt is drawn by a seed of its own, so that rows differ and runs repeat. The text depends on
the Python version, which the results name.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

from knapspec_vllm.bench.arms import UsageError

KINDS = ("docs", "code", "chat")
WORKLOADS = (*KINDS, "mixed")
_SHORTEST_DOCUMENT = 1000  # characters; below, a document is mostly its title
_ATTEMPTS = 100  # to draw a prompt that fits and is not there yet

QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that reverses a linked list.",
    "What should I see in Rome in two days?",
    "Summarise the plot of Romeo and Juliet.",
    "How do I boil an egg so that the yolk stays soft?",
    "How does a computer find a file on a disk?",
    "Compare cats and dogs as pets.",
    "Give me a week of vegetarian dinners with a shopping list.",
    "Explain how vaccines work.",
    "Write an email to my landlord about a leaking roof.",
    "Teach me the rules of chess.",
    "What were the main causes of the First World War?",
    "Write a JavaScript function that validates an email address.",
    "How do I start running? Make a plan of eight weeks.",
    "Describe the water cycle for a school newspaper.",
    "List ten ideas for a small business in a seaside town.",
    "Explain the difference between a list, a tuple, a set and a dictionary in Python.",
    "Write a dialogue between a teacher and a pupil about fractions.",
    "How is bread made?",
    "Write a speech for the opening of a public library.",
)
_STYLES = (
    "", "Be brief.", "Explain it to a child.", "Give an example.", "Use a list.", "Go into detail.",
    "Name your sources.", "Write in short sentences.",
)  # fmt: skip


class Workload:
    """Prompts of one kind of text in one tokenizer's tokens."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        if name not in WORKLOADS:
            raise UsageError(f"--workload {name}: write {', '.join(WORKLOADS)}")
        self.name = name
        self._tokenizer = tokenizer
        self._kinds = KINDS if name == "mixed" else (name,)
        self._documents: dict[str, list[str]] = {}
        self._tokens: dict[tuple[str, int], list[int]] = {}
        # What the tokenizer puts before any text, such as a begin-of-text token.
        self._opening: list[int] = list(tokenizer("")["input_ids"])

    def prompts(self, rows: int, length: int, series: str = "") -> list[list[int]]:
        """`rows` different prompts of exactly `length` tokens; another `series`, other prompts."""
        found: list[list[int]] = []
        for row in range(rows):
            kind = self._kinds[row % len(self._kinds)]
            for attempt in range(_ATTEMPTS):
                generator = random.Random(f"{kind} {length} {series} {row} {attempt}")
                prompt = self._prompt(kind, length, generator)
                if len(prompt) == length and prompt not in found:
                    found.append(prompt)
                    break
            else:
                raise UsageError(
                    f"--context {length} is too short for {rows} different {kind} prompts"
                )
        return found

    def _prompt(self, kind: str, length: int, generator: random.Random) -> list[int]:
        """Longer than `length` where a question does not fit."""
        if kind != "chat":
            body = self._passage(kind, length - len(self._opening), generator)
            return [*self._opening, *body]
        question = f"{generator.choice(QUESTIONS)} {generator.choice(_STYLES)}".strip()
        head, tail = chat_parts(self._tokenizer, question)
        gap = encoded(self._tokenizer, "\n\n")
        room = max(0, length - len(head) - len(tail))
        # The passage goes in front of the question, inside the user's turn.
        passage = self._passage("docs", room - len(gap), generator)
        return [*head, *passage, *gap[:room], *tail]

    def _passage(self, kind: str, length: int, generator: random.Random) -> list[int]:
        """Documents in random order, the first from a random place on."""
        if kind not in self._documents:
            self._documents[kind] = _documents(kind)
        order = list(range(len(self._documents[kind])))
        generator.shuffle(order)
        tokens: list[int] = []
        while len(tokens) < length:
            for index in order:
                document = self._document(kind, index)
                start = 0 if tokens else generator.randrange(max(1, len(document) // 2))
                tokens += document[start:]
                if len(tokens) >= length:
                    break
        return tokens[: max(0, length)]

    def _document(self, kind: str, index: int) -> list[int]:
        if (kind, index) not in self._tokens:
            text = self._documents[kind][index] + "\n\n"
            self._tokens[kind, index] = encoded(self._tokenizer, text)
        return self._tokens[kind, index]


def chat_parts(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """Tokens of a chat with this question: up to the user's words, and from them on."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        opening: list[int] = []  # the template writes it
    else:
        text = f"Question: {question}\nAnswer:"
        opening = list(tokenizer("")["input_ids"])
    before, words, after = text.rpartition(question)
    return [*opening, *encoded(tokenizer, before)], encoded(tokenizer, words + after)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Tokens of the text alone."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _documents(kind: str) -> list[str]:
    texts = _sources() if kind == "code" else _topics()
    found = [text for text in texts if len(text) >= _SHORTEST_DOCUMENT]
    if not found:
        raise UsageError(f"--workload: this Python has no text for {kind}; write another")
    return found


def _topics() -> list[str]:
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics.topics[name] for name in sorted(topics.topics)]


def _sources() -> list[str]:
    """The standard library's modules that are one Python file."""
    found = []
    for name in sorted(sys.stdlib_module_names):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            found.append(Path(spec.origin).read_text(encoding="utf-8", errors="replace"))
    return found
