# SPDX-License-Identifier: Apache-2.0
"""Windows of real text for the solver benchmark: documentation, source code and chats.

A window is a text up to a boundary, before which a solver takes its reference tokens, and the
STRETCH tokens behind it, on which its plans are judged. Seeds are fixed; the first n windows are
the same for every n. Documentation and source code come with Python, so they change with its
version. A chat is a question in the tokenizer's chat template and the model's own answer, sampled
once and cached (`KNAPSPEC_CACHE`): the text that drafts meet when serving.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pydoc_data.topics
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knapspec_vllm.bench.checkpoints import cache_dir

STRETCH = 96
PREFIXES = (100, 400)
"""Tokens before the published solver's reference tokens: fewest and most."""
PUBLISHED_REFERENCES = 48
_ANSWER = PREFIXES[1] + PUBLISHED_REFERENCES + STRETCH
_SEED = 20217

MODULES = (
    *("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "datetime", "difflib"),
    *("enum", "fractions", "functools", "gettext", "heapq", "inspect", "locale", "mailbox"),
    *("pickle", "queue", "random", "shutil", "smtplib", "socketserver", "statistics", "string"),
    *("subprocess", "tarfile", "textwrap", "threading", "traceback", "typing", "uuid", "zipapp"),
)
QUESTIONS = (
    "Explain in detail why the sky is blue and why sunsets are red.",
    "Write a Python class for a bank account with deposits, withdrawals and interest, with tests.",
    "What should I see in Rome in five days? Give me a plan for each day.",
    "Summarise the plot of Romeo and Juliet act by act.",
    "Write a long story about a lighthouse keeper who finds a letter in a bottle.",
    "How does a computer store and find files on a disk? Explain it to a beginner.",
    "Compare cats and dogs as pets: care, cost, temperament and health.",
    "Give me a week of vegetarian dinners with a shopping list.",
    "Explain how vaccines work, and answer three common doubts about them.",
    "Write an email to my landlord about a leaking roof, then a second, firmer one.",
    "Teach me the basics of chess: the pieces, the rules and two openings.",
    "What were the main causes of the First World War?",
    "Write a JavaScript function that validates an email address and explain every line.",
    "How do I start running? Make a training plan of eight weeks.",
    "Describe the water cycle for a school newspaper.",
    "List ten ideas for a small business in a seaside town, with their risks.",
    "Explain the difference between a list, a tuple, a set and a dictionary in Python.",
    "Write a dialogue between a teacher and a pupil about fractions.",
    "How is bread made? Start with the grain and end with the loaf.",
    "Write a speech for the opening of a public library.",
)


@dataclass(frozen=True)
class Window:
    source: str
    """"topics", "source" or "chat"."""
    name: str
    tokens: tuple[int, ...]
    """Everything up to the end of the stretch."""

    @property
    def boundary(self) -> int:
        """First token of the stretch."""
        return len(self.tokens) - STRETCH


def make_windows(folder: Path, number: int) -> list[Window]:
    """The first `number` windows; the three kinds in turn. folder: the model's."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    topics = pydoc_data.topics.topics
    kinds = [
        _Kind("topics", {name: topics[name] for name in sorted(topics)}, tokenizer),
        _Kind("source", {name: _source(name) for name in MODULES}, tokenizer),
    ]
    chats: list[list[int]] = []
    windows = []
    for index in range(number):
        kind = index % 3
        if kind < 2:
            windows.append(kinds[kind].window())
            continue
        chats = chats or sampled_chats(folder, tokenizer)
        turn, question = divmod(index // 3, len(chats))
        # A further turn through the questions takes other prefixes of the same chats.
        length = _length(random.Random(f"{_SEED} chat {turn} {question}"))
        windows.append(Window("chat", QUESTIONS[question], tuple(chats[question][:length])))
    return windows


def _length(generator: random.Random) -> int:
    return generator.randint(*PREFIXES) + PUBLISHED_REFERENCES + STRETCH


class _Kind:
    """Documents in a shuffled order; of each one window at a random place."""

    def __init__(self, source: str, documents: dict[str, str], tokenizer: Any) -> None:
        self._source = source
        self._documents = documents
        self._tokenizer = tokenizer
        self._random = random.Random(f"{_SEED} {source}")
        self._order: list[str] = []

    def window(self) -> Window:
        while True:
            if not self._order:
                self._order = list(self._documents)
                self._random.shuffle(self._order)
            name = self._order.pop()
            length = _length(self._random)
            tokens = self._tokenizer.encode(self._documents[name], add_special_tokens=False)
            if len(tokens) >= length:
                start = self._random.randint(0, len(tokens) - length)
                return Window(self._source, name, tuple(tokens[start : start + length]))


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def sampled_chats(folder: Path, tokenizer: Any) -> list[list[int]]:
    """Tokens of every question with a long answer, sampled at temperature 0.7 in float32."""
    key = hashlib.sha256(json.dumps([folder.name, QUESTIONS, _ANSWER, _SEED]).encode()).hexdigest()
    path = cache_dir() / f"solver-chats-{key[:12]}.json"
    if path.is_file():
        return json.loads(path.read_text())
    import torch
    from transformers import LlamaForCausalLM

    print(f"sampling {len(QUESTIONS)} chats (some minutes, once)", flush=True)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        # An answer that ends early would be too short for a window: it may not end.
        settings = dict(min_new_tokens=_ANSWER, max_new_tokens=_ANSWER)
        found = model.generate(
            **batch, **settings, do_sample=True, temperature=0.7, top_p=0.95, top_k=0
        )
    masked = zip(found.tolist(), batch["attention_mask"].tolist(), strict=True)
    chats = [row[mask.count(0) :] for row, mask in masked]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(chats))
    temporary.replace(path)
    return chats
