# SPDX-License-Identifier: Apache-2.0
"""Sampled output of KnapSpec has plain vLLM's distribution, however bad the draft is."""

from __future__ import annotations

from collections import Counter

import pytest
from engines import engine, metric
from scipy.stats import chi2_contingency

from knapspec_vllm.bench.checkpoints import random_checkpoint

SAMPLES = 30_720
VOCABULARY = 24
#: Several, because a single one concentrates on few tokens.
PROMPTS = [[(3 * i + 7 * j) % VOCABULARY for j in range(6)] for i in range(8)]
#: Cells expected fewer than this often are pooled: the usual rule for a chi-square test.
SMALLEST_CELL = 8

pytestmark = [pytest.mark.slow, pytest.mark.parity]


def draw(llm) -> list[tuple[int, ...]]:
    """(prompt, 4 sampled tokens) of each continuation of PROMPTS at temperature 0.8."""
    from vllm import SamplingParams

    per_request = 128
    chosen = [i % len(PROMPTS) for i in range(SAMPLES // per_request)]
    requests = [{"prompt_token_ids": PROMPTS[i]} for i in chosen]
    # No seed per request: requests with nearby seeds would repeat each other's samples.
    params = SamplingParams(temperature=0.8, max_tokens=4, n=per_request, ignore_eos=True)
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [
        (prompt, *choice.token_ids)
        for prompt, output in zip(chosen, outputs, strict=True)
        for choice in output.outputs
    ]


def p_value(ours: Counter, theirs: Counter) -> float:
    """Two-sample chi-square over the cells, the rare ones pooled."""
    cells = [c for c in ours | theirs if ours[c] + theirs[c] >= 2 * SMALLEST_CELL]
    table = [[counts[c] for c in cells] for counts in (ours, theirs)]
    rest = [counts.total() - sum(row) for counts, row in zip((ours, theirs), table, strict=True)]
    if sum(rest) >= 2 * SMALLEST_CELL:
        table = [[*row, other] for row, other in zip(table, rest, strict=True)]
    assert len(table[0]) > 10, "too few cells to tell distributions apart"
    return float(chi2_contingency(table).pvalue)


@pytest.fixture(scope="module")
def model():
    return random_checkpoint("LlamaForCausalLM", vocab_size=VOCABULARY)


SETTINGS = {"skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 256}


@pytest.fixture(scope="module")
def plain(model) -> list[tuple[int, ...]]:
    with engine(model, **SETTINGS, seed=11) as llm:
        return draw(llm)


#: What is compared: each position, and pairs of positions, of every prompt.
STATISTICS = {
    "token 1": lambda s: (s[0], s[1]),
    "token 2": lambda s: (s[0], s[2]),
    "token 3": lambda s: (s[0], s[3]),
    "token 4": lambda s: (s[0], s[4]),
    "tokens 2, 3": lambda s: (s[0], s[2:4]),
    "tokens 3, 4": lambda s: (s[0], s[3:5]),
}


@pytest.mark.parametrize("plan", ["skip attn:* mlp:0,2", "full"])
def test_same_distribution(model, plain, plan: str) -> None:
    """Every statistic has p > 0.001 against plain vLLM's samples.

    Six statistics of the same distribution fall below 0.001 once in 170 runs by chance, so a first
    failure draws once more; a bias fails again.
    """
    knapspec = {"plan": plan, "draft_length": 3, "debug_invariants": True}
    with engine(model, knapspec, **SETTINGS, num_speculative_tokens=3, seed=12) as llm:
        for _ in range(2):
            ours = draw(llm)
            assert len(ours) == len(plain) == SAMPLES
            values = {
                name: p_value(Counter(map(pick, ours)), Counter(map(pick, plain)))
                for name, pick in STATISTICS.items()
            }
            drafted = metric(llm, "spec_decode_num_draft_tokens")
            accepted = metric(llm, "spec_decode_num_accepted_tokens")
            print(f"{plan}: accepted {accepted:.0f} of {drafted:.0f}; p = {values}")
            if min(values.values()) > 0.001:
                break
    assert 0.02 < accepted / drafted < 0.98  # verification both keeps and replaces tokens
    assert min(values.values()) > 0.001, values


def test_the_test_can_fail(plain) -> None:
    """A shift of 2% of the mass at one position is caught."""
    shifted = [
        s if i % 50 else (*s[:2], (s[2] + 1) % VOCABULARY, *s[3:]) for i, s in enumerate(plain)
    ]
    pick = STATISTICS["token 2"]
    assert p_value(Counter(map(pick, shifted)), Counter(map(pick, plain))) < 0.001
