# SPDX-License-Identifier: Apache-2.0
"""The plain torch Llama is the model transformers runs, in all of its ways to be run."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from knapspec_vllm.bench.checkpoints import random_checkpoint  # noqa: E402  (after the skip)
from knapspec_vllm.planner.solver import BranchRunner  # noqa: E402
from knapspec_vllm.planner.types import Mode, Plan  # noqa: E402
from tests.llama_runner import LlamaModel, LlamaRunner, Text, judge, run_plans  # noqa: E402
from tests.published_solver import PathModel, branch_mask, target_states  # noqa: E402

TOLERANCE = {"rtol": 1e-5, "atol": 5e-4}
"""Logits up to 34 in float32 after 60 sublayers: sums in another order were measured to differ by
5e-5, a RoPE base that is 1% off by 0.05."""
TOKENS, START = 60, 44


@pytest.fixture(scope="module", params=["tied", "untied", "smollm2"])
def folder(request, tmp_path_factory):
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2_path")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KNAPSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return random_checkpoint(
            head_dim=16,  # heads * head_dim is not the hidden size
            num_hidden_layers=3,
            tie_word_embeddings=request.param == "tied",
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )


@pytest.fixture(scope="module")
def model(folder):
    return LlamaModel(folder)


@pytest.fixture(scope="module")
def tokens(model):
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.logits(model.embed(torch.tensor([0]))).shape[-1]
    return torch.randint(0, vocabulary, (TOKENS,), generator=generator).tolist()


@pytest.fixture(scope="module")
def expected(folder, tokens):
    """[T, vocabulary] of transformers."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def runner(model, tokens) -> LlamaRunner:
    return LlamaRunner(Text(model, tokens), START, TOKENS, window=12, sinks=3)


def test_runner_serves_both_solvers(runner):
    branches: BranchRunner = runner
    paths: PathModel = runner
    assert branches.num_layers == paths.num_layers == len(runner.model.layers)


def test_text_logits_are_those_of_transformers(model, tokens, expected):
    states = Text(model, tokens).states
    torch.testing.assert_close(model.logits(states), expected, **TOLERANCE)


def test_full_plan_logits_are_those_of_transformers(runner, expected):
    """Branches over the prefix, as the solver runs them; every branch gets the same."""
    states = runner.reference_states().expand(3, -1, -1)
    for layer in range(runner.num_layers):
        states = runner.attention(layer, states.contiguous(), False)[0]
        states = runner.mlp(layer, states)
    for branch in states:
        torch.testing.assert_close(runner.model.logits(branch), expected[START:], **TOLERANCE)
    assert torch.equal(runner.top1(states)[1], expected[START:].argmax(dim=-1))


def test_masked_logits_are_those_of_transformers(runner, expected):
    """One path under the oracle's mask."""
    states = target_states(runner)
    assert len(states) == 2 * runner.num_layers + 1
    torch.testing.assert_close(runner.model.logits(states[-1]), expected[START:], **TOLERANCE)


def test_branches_and_masked_paths_are_the_same_function(runner):
    """Two different streams, as branches and concatenated under the mask; neither sees the other"""
    generator = torch.Generator().manual_seed(1)
    states = runner.reference_states().repeat(2, 1, 1)
    states = states * (1 + 0.3 * torch.randn(states.shape, generator=generator))
    reference = TOKENS - START
    positions = torch.arange(START, TOKENS).repeat(2)
    mask = branch_mask(2, reference, START, torch.float32)
    packed = runner.masked_attention(1, states.flatten(0, 1), positions, mask)
    branches = runner.attention(1, states, False)[0]
    torch.testing.assert_close(packed.view(states.shape), branches, rtol=1e-4, atol=1e-4)


def test_window_sees_sinks_and_newest_keys(runner):
    states = runner.reference_states().unsqueeze(0)
    full, window = runner.attention(0, states, True)
    positions = torch.arange(START, TOKENS)
    key = torch.arange(TOKENS)
    sees = (key < 3) | (key > positions[:, None] - 12)
    sees &= key <= positions[:, None]
    mask = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
    expected = runner.masked_attention(0, states[0], positions, mask)
    torch.testing.assert_close(window[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(window, full, atol=1e-3)


def test_plans_run_together_as_they_run_alone(runner):
    """Shared beginnings are run once; results come back in the order of the plans."""
    layers = runner.num_layers
    texts = ["skip mlp:1", "skip attn:1", "window attn:0; skip mlp:1", "skip attn:2 mlp:2", "full"]
    plans = [Plan.parse(text, layers) for text in texts]
    together = run_plans(runner, [*plans, plans[0]])
    for plan, states in zip([*plans, plans[0]], together, strict=True):
        alone = runner.reference_states().unsqueeze(0)
        for layer in range(layers):
            mode = plan.attention(layer)
            if mode is not Mode.SKIP:
                alone = runner.attention(layer, alone, True)[0 if mode is Mode.FULL else 1]
            if plan.mlp(layer) is Mode.FULL:
                alone = runner.mlp(layer, alone)
        torch.testing.assert_close(states, alone[0], rtol=1e-4, atol=2e-3)


def test_judge_counts_agreement(runner, expected):
    """The target agrees with itself everywhere; a plan with nothing but the embedding does not."""
    layers = runner.num_layers
    empty = Plan((Mode.SKIP,) * (2 * layers))
    stretch = TOKENS - START
    assert judge(runner, [Plan.full(layers), empty], at_once=1)[0] == stretch
    own = runner.top1(runner.reference_states())
    agreed = int((own == expected[START:].argmax(dim=-1)).sum())
    assert judge(runner, [empty, Plan.full(layers)]) == [agreed, stretch]
    assert agreed < stretch


def test_bfloat16_is_close(folder, tokens, expected):
    """Eight bits of mantissa through every layer: measured 0.065 of the logits' spread at worst."""
    model = LlamaModel(folder, torch.bfloat16)
    logits = model.logits(Text(model, tokens).states)
    assert logits.dtype is torch.bfloat16
    error = (logits.float() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.1
