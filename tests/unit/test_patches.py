# SPDX-License-Identifier: Apache-2.0
"""The patch helper, the ledger, and what the patches do to real vLLM objects.

Over 300 lines because every patch is tested here against the same few real vLLM objects.
"""

import dataclasses
import inspect
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from knapspec_vllm import compat, patches, refusals
from knapspec_vllm.patches import apply, ledger, selection, vllm_config
from knapspec_vllm.plugin import register

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# --- the helper, without vLLM ---


class Target:
    def method(self, tokens: int, limit: int = 3) -> int:
        return tokens

    @property
    def width(self) -> int:
        return 1

    @staticmethod
    def build(parser: str) -> str:
        return parser


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    try:
        from vllm.plugins import load_general_plugins
    except ImportError:
        pass
    else:
        load_general_plugins()  # vLLM would call it at the first EngineArgs, behind our back
    apply.restore_all()
    yield
    apply.restore_all()


def doubled(original: Any) -> Any:
    def method(self: Any, *args: Any) -> Any:
        return 2 * original(self, *args)

    return method


def test_replace_is_idempotent_and_reversible() -> None:
    before = Target.method
    assert apply.replace("double", Target, "method", doubled, ("tokens", "limit"))
    assert not apply.replace("double", Target, "method", doubled)
    assert Target().method(3) == 6
    assert apply.installed() == ("double",)
    apply.restore_all()
    assert Target.method is before
    assert apply.installed() == ()


def test_replace_refuses_a_changed_signature() -> None:
    with pytest.raises(apply.PatchError, match="no longer takes logits"):
        apply.replace("double", Target, "method", doubled, ("tokens", "logits"))
    with pytest.raises(apply.PatchError, match="does not exist"):
        apply.replace("double", Target, "gone", doubled)
    assert Target().method(3) == 3


def test_replace_refuses_another_copy_of_itself() -> None:
    apply.replace("double", Target, "method", doubled)
    ours, apply._applied = apply._applied, {}  # what a second copy of the package would see
    try:
        with pytest.raises(apply.PatchError, match="patched already"):
            apply.replace("double", Target, "method", doubled)
    finally:
        apply._applied = ours


def test_restore_leaves_what_others_wrapped_later() -> None:
    before = Target.method
    apply.replace("double", Target, "method", doubled)
    theirs = doubled(Target.method)
    Target.method = theirs  # type: ignore[method-assign]
    assert not apply.replace("double", Target, "method", doubled)
    apply.restore_all()
    assert Target.method is theirs
    Target.method = before  # type: ignore[method-assign]


def test_properties_and_staticmethods() -> None:
    apply.replace("wide", Target, "width", lambda p: property(lambda self: p.fget(self) + 1))
    apply.replace("built", Target, "build", lambda s: staticmethod(lambda parser: s(parser) + "!"))
    assert Target().width == 2
    assert Target.build("a") == "a!"
    apply.restore_all()
    assert Target().width == 1
    assert Target.build("a") == "a"


# --- the ledger ---


@pytest.mark.parametrize("patch", ledger.PATCHES, ids=lambda patch: patch.name)
def test_every_row_is_complete(patch: ledger.Patch) -> None:
    for field in dataclasses.fields(patch):
        if field.name != "stands_in_for":
            assert getattr(patch, field.name), field.name
    assert patch.what.endswith(".")
    assert patch.why.endswith(".")
    assert patch.remove_when.endswith(".")
    assert not patch.stands_in_for or ledger.by_name(patch.stands_in_for)


def test_names_and_targets_are_unique() -> None:
    assert len({patch.name for patch in ledger.PATCHES}) == len(ledger.PATCHES)
    assert len({patch.target for patch in ledger.PATCHES}) == len(ledger.PATCHES)


@pytest.mark.parametrize("patch", ledger.PATCHES, ids=lambda patch: patch.name)
def test_every_target_exists(patch: ledger.Patch) -> None:
    pytest.importorskip("vllm")
    try:
        owner, attribute = compat.resolve(patch.target)
    except AttributeError:
        replaced_by = [other for other in ledger.PATCHES if other.stands_in_for == patch.name]
        assert replaced_by
        compat.resolve(replaced_by[0].target)
        return
    found = inspect.getattr_static(owner, attribute)
    function = found.fget if isinstance(found, property) else found
    assert compat.missing_parameters(function, patch.seam.parameters) == []


# --- rewriting the short form, without vLLM ---

THEIRS = frozenset({"num_speculative_tokens", "draft_tensor_parallel_size", "model", "method"})


def test_short_form_becomes_vllms_form() -> None:
    result = selection.rewrite(
        {"method": "knapspec", "bins": 16, "num_speculative_tokens": 4}, {"mine": 1}, THEIRS
    )
    assert result.speculative_config == {
        "method": "custom_class",
        "model": "knapspec_vllm.KnapSpecProposer",
        "num_speculative_tokens": 4,
    }
    assert result.additional_config == {"mine": 1, "knapspec": {"bins": 16}}
    again = selection.rewrite(result.speculative_config, result.additional_config, THEIRS)
    assert again == result


def test_defaults_leave_additional_config_alone() -> None:
    result = selection.rewrite({"method": "knapspec"}, None, THEIRS)
    assert result.speculative_config["num_speculative_tokens"] == 8
    assert result.additional_config == {}


@pytest.mark.parametrize(
    "given, additional, words",
    [
        ({"bin": 1}, None, "did you mean 'bins'?"),
        ({"num_speculative_token": 1}, None, "did you mean 'num_speculative_tokens'?"),
        ({"draft_tensor_parallel_size": 1}, None, "'draft_tensor_parallel_size' has no meaning"),
        ({"model": "org/draft"}, None, 'remove "model"'),
        ({"bins": 16}, {"knapspec": {"bins": 8}}, "set it in one of them"),
        ({}, {"knapspec": {"bin": 8}}, "did you mean 'bins'?"),
        ({}, {"knapspec": 3}, "must be a mapping"),
        ({}, "text", "must then be a mapping"),
    ],
)
def test_rewrite_refuses_in_words(given: dict, additional: Any, words: str) -> None:
    with pytest.raises(ValueError, match="knapspec") as caught:
        selection.rewrite({"method": "knapspec", **given}, additional, THEIRS)
    assert words in str(caught.value)


# --- real vLLM objects ---


@pytest.fixture
def model(tmp_path: Path) -> str:
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def build(model: str, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"skip_tokenizer_init": True, "max_model_len": 128} | arguments
    return EngineArgs(model=model, **arguments).create_engine_config()


def described(config: Any) -> str:
    """Everything a config says, without what differs between any two of them."""
    fields = {
        field.name: repr(getattr(config, field.name, None))
        for field in dataclasses.fields(config)
        if field.name != "instance_id"
    }
    return json.dumps(fields, sort_keys=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"additional_config": {"mine": 1}},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"speculative_config": {"model": "other.Proposer", "num_speculative_tokens": 3}},
    ],
    ids=["plain", "additional", "ngram", "custom_class"],
)
def test_unselected_configs_are_the_same_with_and_without_the_plugin(
    model: str, arguments: dict[str, Any]
) -> None:
    import copy

    without = build(model, **copy.deepcopy(arguments))
    register()
    assert apply.installed()
    with_plugin = build(model, **copy.deepcopy(arguments))
    assert described(with_plugin) == described(without)
    assert with_plugin.compute_hash() == without.compute_hash()
    for name in ("num_lookahead_tokens", "num_speculative_tokens", "use_v2_model_runner"):
        assert getattr(with_plugin, name, None) == getattr(without, name, None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"speculative_config": {"method": "knapspec", "num-speculative-tokens": 5, "bins": 16}},
        {
            "speculative_config": {
                "model": "knapspec_vllm.draft.proposer.KnapSpecProposer",
                "num_speculative_tokens": 5,
            },
            "additional_config": {"knapspec": {"bins": 16}},
        },
        {
            "spec_method": "knapspec",
            "spec_tokens": 5,
            "additional_config": {"knapspec": {"bins": 16}},
        },
    ],
    ids=["short", "official", "flags"],
)
def test_selected_in_every_form(model: str, arguments: dict[str, Any]) -> None:
    register()
    config = build(model, **arguments)
    assert selection.is_selected(config)
    assert config.speculative_config.method == "custom_class"
    assert config.speculative_config.num_speculative_tokens == 5
    assert config.additional_config["knapspec"] == {"bins": 16}
    assert config.use_v2_model_runner is False
    assert config.scheduler_config.async_scheduling is False
    if compat.has_lookahead_property():
        assert config.num_lookahead_tokens == 5
    # The settings reach workers by pickling, and a worker knows that it was selected.
    there = pickle.loads(pickle.dumps(config))
    assert selection.is_selected(there)
    assert there.additional_config == config.additional_config


@pytest.mark.parametrize(
    "arguments, settings, asynchronous",
    [
        ({}, {}, True),  # as plain vLLM
        ({"tensor_parallel_size": 2}, {}, True),
        ({"async_scheduling": True}, {}, True),
        ({"async_scheduling": False}, {}, False),
        ({}, {"debug_invariants": True}, False),
    ],
)
def test_asynchronous_where_it_can_be(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    asynchronous: bool,
) -> None:
    monkeypatch.setattr(refusals, "ASYNC_DEVICES", ("cpu",))  # stands for a GPU
    said: list[str] = []
    monkeypatch.setattr(vllm_config.logger, "warning", lambda text, *a: said.append(text % a))
    register()
    config = build(model, speculative_config={"method": "knapspec", **settings}, **arguments)
    assert config.scheduler_config.async_scheduling is asynchronous
    assert bool(said) == bool(settings)
    assert all("needs debug_invariants" in text for text in said)


@pytest.mark.parametrize("additional", [{}, {"mine": 1}])
def test_vllm_compiles_nothing_again_for_settings(model: str, additional: dict[str, Any]) -> None:
    """The key of its compilation cache is that of a custom_class without any."""
    register()

    def key(**settings: Any) -> str:
        speculative = {"method": "knapspec", **settings}
        config = build(model, speculative_config=speculative, additional_config=dict(additional))
        return config.compute_hash()

    assert len({key(), key(bins=16), key(store_dir="elsewhere", windows=False)}) == 1
    assert key() != build(model, speculative_config={"method": "knapspec"},
                          additional_config={"other": 2}).compute_hash()  # fmt: skip


def test_one_engine_args_can_build_two_configs(model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    args = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=128,
        speculative_config={"method": "knapspec", "bins": 16},
    )
    for _ in range(2):
        assert args.create_engine_config().additional_config == {"knapspec": {"bins": 16}}


def test_command_line(model: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    options = parser.parse_args(["--model", model, "--spec-method", "knapspec"])
    assert AsyncEngineArgs.from_cli_args(options).spec_method == "knapspec"
    options = parser.parse_args(["--model", model, "-sc", '{"method": "knapspec", "bins": 16}'])
    assert AsyncEngineArgs.from_cli_args(options).speculative_config["bins"] == 16


def test_flag_and_key_are_exclusive(model: str) -> None:
    register()
    with pytest.raises(ValueError, match=r"--spec-tokens and .* mutually exclusive"):
        build(
            model,
            speculative_config={"method": "knapspec", "num_speculative_tokens": 4},
            spec_tokens=5,
        )


def test_worker_patches_wait_for_a_selected_worker(model: str) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    register()
    plain = build(model)
    selected = build(model, speculative_config={"method": "knapspec"})
    WorkerBase(plain, local_rank=0, rank=0, distributed_init_method="")
    assert "propose" not in apply.installed()
    WorkerBase(vllm_config=selected, local_rank=0, rank=0, distributed_init_method="")
    WorkerBase(vllm_config=selected, local_rank=0, rank=0, distributed_init_method="")
    for name in ("propose", "fits_in_drafter", "calibrate_gpu"):
        assert name in apply.installed()


class Recorder:
    """Stands for KnapSpecProposer: what it is called with."""

    asynchronous = scheduling = None

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def propose_full(self, runner: Any, **given: Any) -> list[list[int]]:
        self.calls.append(("propose_full", given))
        return [[7]]

    def attach(self, runner: Any) -> None:
        self.calls.append(("attach", runner))


def test_the_proposer_gets_the_runner_and_all_arguments(model: str) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    original = GPUModelRunner.propose_draft_token_ids
    names = list(inspect.signature(original).parameters)[1:]
    patches.install_in_worker(WorkerBase)
    drafter = Recorder()
    runner = SimpleNamespace(drafter=drafter, _draft_probs=1, _draft_prob_req_ids=1)
    arguments = [object() for _ in names]
    assert GPUModelRunner.propose_draft_token_ids(runner, *arguments) == [[7]]
    assert drafter.calls == [("propose_full", dict(zip(names, arguments, strict=True)))]
    assert runner._draft_probs is None
    assert runner._draft_prob_req_ids is None
    by_name = dict(zip(names, arguments, strict=True))
    GPUModelRunner.propose_draft_token_ids(runner, **by_name)
    assert drafter.calls[1] == drafter.calls[0]


@pytest.mark.parametrize("selected", [True, False])
def test_whole_decode_steps_are_captured_for_a_token_a_row(model: str, selected: bool) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.config.compilation import CompilationMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    register()
    patches.install_in_worker(WorkerBase)
    config = build(model, speculative_config={"method": "knapspec", "num_speculative_tokens": 8})
    compilation = config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.cudagraph_capture_sizes = [1, 2, 4, 8, 16, 24, 32]
    compilation.max_cudagraph_capture_size = 32
    compilation.splitting_ops = None  # as on a GPU
    compilation.set_splitting_ops_for_v1("none")
    dispatcher = CudagraphDispatcher(config)
    runner: Any = SimpleNamespace(
        drafter=Recorder() if selected else object(),
        uniform_decode_query_len=9,  # as vLLM sets it
        cudagraph_dispatcher=dispatcher,
        vllm_config=config,
        compilation_config=compilation,
        speculative_config=config.speculative_config,
        parallel_config=config.parallel_config,
        kv_cache_config=None,
        max_num_reqs=16,
    )

    class Builder:
        @staticmethod
        def get_cudagraph_support(*_: Any) -> AttentionCGSupport:
            return AttentionCGSupport.UNIFORM_BATCH

    backend = type("Backend", (), {"get_builder_cls": staticmethod(lambda: Builder)})
    group = SimpleNamespace(kv_cache_spec=None)
    GPUModelRunner._check_and_update_cudagraph_mode(runner, [{backend}], [group])

    def step(rows: int, tokens_per_row: int) -> tuple[str, int]:
        """Graphs, and how many tokens are computed."""
        tokens = rows * tokens_per_row
        uniform = GPUModelRunner._is_uniform_decode(
            tokens_per_row, runner.uniform_decode_query_len, tokens, rows
        )
        mode, batch = dispatcher.dispatch(tokens, uniform_decode=uniform)
        return mode.name, batch.num_tokens

    if selected:
        assert step(1, 1) == ("FULL", 1)
        assert step(3, 1) == ("FULL", 4)
        assert step(3, 5) == ("PIECEWISE", 16)
        assert step(3, 9) == ("PIECEWISE", 32)
    else:  # what it would be, and is for other methods
        assert step(1, 1) == ("PIECEWISE", 9)
        assert step(3, 1) == ("PIECEWISE", 9)
        assert step(3, 9) == ("FULL", 27)


def test_one_long_row_does_not_stop_the_others(model: str) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    patches.install_in_worker(WorkerBase)
    metadata = SimpleNamespace(max_seq_len=126)
    ours = SimpleNamespace(drafter=Recorder())
    assert GPUModelRunner._input_fits_in_drafter(ours, metadata) is True
    assert GPUModelRunner._input_fits_in_drafter(ours, None) is False
    other = SimpleNamespace(
        drafter=object(),
        num_spec_tokens=4,
        effective_drafter_max_model_len=128,
        speculative_config=SimpleNamespace(use_dflash=lambda: False),
    )
    assert GPUModelRunner._input_fits_in_drafter(other, metadata) is False


def test_calibration_follows_warm_up_and_keeps_the_seed(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", monitor := object())

    def calibrate(drafter: Recorder) -> None:
        assert knobs.runtime.jit_post_compile_hook is None  # what compiles here is expected to
        torch.rand(3)
        drafter.calls.append(("calibrate", None))

    monkeypatch.setattr("knapspec_vllm.calibration.startup.calibrate", calibrate)
    monkeypatch.delenv("KNAPSPEC_RUN_FOLDER", raising=False)

    class Worker:
        """The shape of vLLM's workers; building a real one loads a model."""

        def __init__(self, drafter: Any) -> None:
            self.model_runner = SimpleNamespace(drafter=drafter, device=torch.device("cpu"))
            self.vllm_config = None

        def compile_or_warm_up_model(self) -> str:
            return "times"

    class CustomWorker(Worker):
        pass

    from knapspec_vllm.patches import workers

    workers.install(CustomWorker)
    drafter = Recorder()
    worker = CustomWorker(drafter)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert worker.compile_or_warm_up_model() == "times"
    assert drafter.calls == [("attach", worker.model_runner), ("calibrate", None)]
    assert knobs.runtime.jit_post_compile_hook is monitor
    assert torch.equal(torch.rand(2), expected)
    assert CustomWorker(object()).compile_or_warm_up_model() == "times"


def test_cpu_sampling_parameters_reach_the_kernel(model: str) -> None:
    """The fix must take effect where vLLM calls the kernel, however late it is installed."""
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON or not current_platform.is_cpu():
        pytest.skip("real Triton kernels run here")
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if not any(hasattr(rejection_sampler.expand_kernel, name) for name in ("_impl", "func")):
        override = getattr(current_platform, "register_triton_kernel_overrides", None)
        if override is not None:
            override()
        else:  # up to 0.27 the runner's constructor does it
            CPUModelRunner._postprocess_triton(None)
    from vllm.v1.worker.worker_base import WorkerBase

    patches.install_in_worker(WorkerBase)
    assert "cpu_expand" in apply.installed()
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperature = torch.tensor([0.0, 0.7, 1.5])
    expanded = rejection_sampler.expand_batch_to_tokens(temperature, ends, 5, 0, 1)
    assert torch.equal(expanded, torch.tensor([1.0, 1.0, 1.5, 1.5, 1.5]))
    for dtype in (torch.int32, torch.int64):
        top_k = torch.tensor([5, 6, 7], dtype=dtype)
        expanded = rejection_sampler.expand_batch_to_tokens(top_k, ends, 5)
        assert expanded.tolist() == [5, 5, 7, 7, 7]


def test_scheduler_reserves_lookahead_slots(model: str) -> None:
    """Whichever way this vLLM computes it, the scheduler's own number counts."""
    register()
    config = build(model, speculative_config={"method": "knapspec", "num_speculative_tokens": 6})
    assert scheduler_of(config).num_lookahead_tokens == 6
    assert scheduler_of(build(model)).num_lookahead_tokens == 0


def scheduler_of(config: Any) -> Any:
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32)
    config.cache_config.num_gpu_blocks = 16
    cache = KVCacheConfig(
        num_blocks=16,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return Scheduler(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
    )
