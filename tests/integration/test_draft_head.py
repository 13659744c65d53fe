# SPDX-License-Identifier: Apache-2.0
"""The head in 8-bit integers drafts what the model's own head would, and is refused where not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import engine, force, greedy, output_states, proposer_of, text_prompts

from knapspec_vllm import ops
from knapspec_vllm.bench.checkpoints import random_checkpoint
from knapspec_vllm.calibration import faster, startup
from knapspec_vllm.draft import proposer, screened_head
from knapspec_vllm.draft.head import GreedyHead
from knapspec_vllm.draft.screened_head import NoScreenError, ScreenedHead

pytestmark = pytest.mark.slow

SETTINGS = {"plan": "skip mlp:1", "draft_length": 4, "draft_head": "screened"}
TINY = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 4}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def llm(smollm2_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    options = {"dtype": request.param, "max_model_len": 512, "max_num_seqs": 4}
    with engine(smollm2_path, SETTINGS, **options) as llm:
        yield llm


def test_tokens_and_probabilities_of_the_full_head(llm: Any, smollm2_path: Path) -> None:
    proposer = proposer_of(llm)
    view, screen = proposer.engine.view, proposer.screen
    hidden = output_states(llm, text_prompts(smollm2_path, (40, 80, 120, 160)), 24)
    assert len(hidden) > 90
    with torch.inference_mode():
        wanted, probability = ops.greedy_confidence(view.logits(hidden))
        token_ids, _, total = screen.partials(hidden, True)
        unsure, _, ones = screen.partials(hidden, False)
        rough = screen.rough_logits(hidden).argmax(dim=-1)
    assert torch.equal(token_ids, wanted)
    assert torch.equal(unsure, wanted)
    assert (rough != wanted).any(), "what it is compared with could not be told from it"
    # Logits that are not the candidates' are off by 2.5% (root mean square).
    assert (total.reciprocal() - probability).abs().max() < 0.05
    assert torch.equal(ones, torch.ones(len(hidden)))


def test_it_drafts_what_the_full_head_does(llm: Any, smollm2_path: Path) -> None:
    """Were a single token another one, so would be how many of them are accepted."""
    proposer = proposer_of(llm)
    prompts = text_prompts(smollm2_path, (30, 70, 110))
    accepted, tokens = [], []
    for screen in (None, proposer.screen):
        proposer.drafter.head.screen = screen
        force(llm, "skip mlp:1", 4)
        before = proposer.stats.accepted_tokens
        tokens.append(greedy(llm, prompts, 40))
        accepted.append(proposer.stats.accepted_tokens - before)
    assert tokens[0] == tokens[1]
    assert accepted[0] == accepted[1] > 20


def test_what_it_takes_is_said(llm: Any) -> None:
    proposer = proposer_of(llm)
    assert proposer.drafter.head.kind == "screened"
    weights = 49152 * 576
    assert weights < proposer.snapshot()["memory_bytes"]["head"] < 1.02 * weights


@torch.inference_mode()
def test_weights_that_are_loaded_anew(llm: Any) -> None:
    """vLLM makes their products then, as it did when they were first loaded."""
    proposer = proposer_of(llm)
    screen, head = proposer.screen, proposer.engine.view.target.lm_head
    hidden = torch.randn(8, 576).to(head.weight.dtype)
    weight = head.weight.clone()
    wanted = proposer.engine.view.logits(hidden).argmax(dim=-1)
    try:
        head.weight.copy_(weight.roll(1000, dims=0))
        head.quant_method.process_weights_after_loading(head)
        moved, _, _ = screen.partials(hidden, False)
    finally:
        head.weight.copy_(weight)
        head.quant_method.process_weights_after_loading(head)
    assert torch.equal(moved, (wanted + 1000) % len(weight))
    assert torch.equal(screen.partials(hidden, False)[0], wanted)


def head_of(weight: torch.Tensor, padding: int = 0, **processor: Any) -> Any:
    """A model of one head, [V, d], with rows of padding behind its tokens."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    with set_current_vllm_config(VllmConfig()):
        made = LogitsProcessor(len(weight), **processor)
    padded = torch.cat([weight, weight.new_full((padding, weight.shape[1]), 9.0)])
    method = UnquantizedEmbeddingMethod()
    head = torch.nn.Module()
    head.weight = torch.nn.Parameter(padded, requires_grad=False)
    head.quant_method = method
    head.shard_indices = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=len(weight))
    method.process_weights_after_loading(head)
    return SimpleNamespace(target=SimpleNamespace(lm_head=head, logits_processor=made))


@pytest.mark.usefixtures("llm")
class TestHeads:
    """Made by hand, beside an engine: vLLM's kernels are loaded then."""

    def test_padding_is_never_drafted(self) -> None:
        weight = torch.randn(500, 64)
        screen = ScreenedHead(head_of(weight, padding=12))
        hidden = torch.full((3, 64), 5.0)  # which padding rows would like best
        token_ids, logits, _ = screen.partials(hidden, False)
        assert token_ids.tolist() == (hidden @ weight.T).argmax(-1).tolist()
        torch.testing.assert_close(logits, (hidden @ weight.T).amax(-1))

    def test_the_first_of_equal_tokens(self) -> None:
        weight = torch.randn(300, 64)
        weight[[40, 120, 260]] = 3.0 * weight[7]
        hidden = weight[7][None]
        token_ids, _, _ = ScreenedHead(head_of(weight)).partials(hidden, False)
        assert token_ids.tolist() == [40]

    def test_fewer_tokens_than_candidates(self) -> None:
        weight = torch.randn(5, 64)
        hidden = torch.randn(4, 64)
        token_ids, _, _ = ScreenedHead(head_of(weight)).partials(hidden, True)
        assert token_ids.tolist() == (hidden @ weight.T).argmax(-1).tolist()

    def test_capped_and_scaled_probabilities(self) -> None:
        weight, hidden = torch.randn(400, 64), torch.randn(6, 64)
        screen = ScreenedHead(head_of(weight, soft_cap=4.0, scale=0.5))
        _, maximum, total = screen.partials(hidden, True)
        logits = 0.5 * 4.0 * torch.tanh(hidden @ weight.T / 4.0)
        torch.testing.assert_close(maximum, logits.amax(-1))
        wanted = torch.softmax(logits, dim=-1).amax(-1)
        torch.testing.assert_close(total.reciprocal(), wanted, rtol=0.03, atol=0.0)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda target: setattr(target.lm_head, "bias", torch.ones(300)), "bias"),
            (lambda target: setattr(target.lm_head, "quant_method", object()), "quantised"),
            (lambda target: setattr(target.logits_processor, "scale", -1.0), "scaled by -1.0"),
            (lambda target: setattr(target.logits_processor, "head_dtype", torch.half), "float16"),
            (lambda target: delattr(target, "logits_processor"), "logits processor"),
        ],
    )
    def test_what_it_cannot_stand_for(self, change: Any, said: str) -> None:
        view = head_of(torch.randn(300, 64))
        change(view.target)
        with pytest.raises(NoScreenError, match=said):
            ScreenedHead(view)

    def test_a_product_that_is_wrong_is_found_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(layer: Any, dtype: torch.dtype) -> Any:
            noise = torch.randn(16, 300)
            return SimpleNamespace(apply_weights=lambda layer, hidden: noise[: len(hidden)])

        monkeypatch.setattr(screened_head, "_kernel", wrong)
        with pytest.raises(NoScreenError, match="do not lead to"):
            ScreenedHead(head_of(torch.randn(300, 64)))

    def test_a_product_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No error of the copy, whatever it is, ends the start of a server that did not ask."""

        def fails(layer: Any, hidden: torch.Tensor) -> None:
            raise AssertionError("no kernel image")

        made = SimpleNamespace(apply_weights=fails)
        monkeypatch.setattr(screened_head, "_kernel", lambda layer, dtype: made)
        view: Any = head_of(torch.randn(300, 64))
        assert screened_head.screen_of(view, settings("auto"), ON_CPU) is None
        with pytest.raises(NoScreenError, match=r'kernel image; write "draft_head": "full"'):
            screened_head.screen_of(view, settings("screened"), ON_CPU)


def settings(head: str, draft_length: int | None = None) -> Any:
    return SimpleNamespace(draft_head=head, draft_length=draft_length)


def served_on(device: str, sleeps: bool = False) -> Any:
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(enable_sleep_mode=sleeps),
    )


ON_CPU = served_on("cpu")


@pytest.mark.usefixtures("llm")  # ranks are vLLM's to count
def test_who_gets_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    view: Any = head_of(torch.randn(300, 64))
    assert screened_head.screen_of(view, settings("auto"), ON_CPU) is not None
    assert screened_head.screen_of(view, settings("full"), ON_CPU) is None
    assert screened_head.screen_of(view, settings("auto", 0), ON_CPU) is None
    assert screened_head.screen_of(view, settings("auto"), served_on("cuda")) is None
    assert screened_head.screen_of(view, settings("screened"), served_on("cuda")) is not None
    assert screened_head.screen_of(view, settings("auto"), served_on("cpu", True)) is None
    with pytest.raises(NoScreenError, match="enable_sleep_mode"):
        screened_head.screen_of(view, settings("screened"), served_on("cuda", True))
    # The other rank is made up: of few tokens, or of a machine that lacks the product.
    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, *_, **__: flag.zero_())
    assert screened_head.screen_of(view, settings("auto"), ON_CPU) is None


@pytest.mark.parametrize("cheaper", ["full", "screened"])
def test_calibration_chooses_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheaper: str
) -> None:
    """By time: one head or the other is made to take 50 ms longer."""
    model = random_checkpoint("LlamaForCausalLM")
    called, clock = GreedyHead.__call__, [0.0]

    def slow(head: GreedyHead, hidden: torch.Tensor) -> Any:
        clock[0] += 0.001 if head.kind == cheaper else 0.051
        return called(head, hidden)

    knapspec = {"calibration": "auto", "store_dir": str(tmp_path)}
    monkeypatch.setattr(startup, "_disturbed", lambda samples: None)  # or it stores nothing
    with monkeypatch.context() as patch:
        patch.setattr(GreedyHead, "__call__", slow)
        patch.setattr(faster, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        with engine(model, knapspec, **TINY) as llm:
            first = proposer_of(llm)
            assert first.calibration["source"] == "measured"
            assert first.drafter.head.kind == cheaper
            assert ("head" in first.snapshot()["memory_bytes"]) is (cheaper == "screened")
    with monkeypatch.context() as patch:
        patch.setattr(startup, "faster_head", lambda *_: pytest.fail("it is stored"))
        for more in ({}, {"calibration": "off"}):
            with engine(model, {**knapspec, **more}, **TINY) as llm:
                assert proposer_of(llm).calibration["source"] == "stored"
                assert proposer_of(llm).drafter.head.kind == cheaper
    # Curves of a head that there is none of now are of no use.
    monkeypatch.setattr(proposer, "screen_of", lambda *_: None)
    with engine(model, knapspec, **TINY) as llm:
        source = proposer_of(llm).calibration["source"]
        assert source == ("stored" if cheaper == "full" else "measured")
        assert proposer_of(llm).drafter.head.kind == "full"


@pytest.mark.parametrize(
    "knapspec",
    [
        {"draft_head": "full"},
        {"calibration": "off"},
        {"plan": "skip mlp:1", "draft_length": 2},
        {"draft_length": 0},
    ],
    ids=["full", "uncalibrated", "forced", "idle"],
)
def test_no_copy_is_kept_where_none_was_chosen(tmp_path: Path, knapspec: dict[str, Any]) -> None:
    knapspec = {"store_dir": str(tmp_path), "calibration_seconds": 1.0, **knapspec}
    with engine(random_checkpoint("LlamaForCausalLM"), knapspec, **TINY) as llm:
        assert proposer_of(llm).screen is None
        assert proposer_of(llm).drafter.head.kind == "full"
        assert "head" not in proposer_of(llm).snapshot()["memory_bytes"]
