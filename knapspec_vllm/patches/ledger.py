# SPDX-License-Identifier: Apache-2.0
"""Every monkey-patch of vLLM in one table: what, why, upstream reference, when to remove it."""

from __future__ import annotations

from dataclasses import dataclass

from knapspec_vllm.compat import Seam


@dataclass(frozen=True)
class Patch:
    """One row. The code is in the file of this package named after the patched module."""

    name: str
    seam: Seam
    """Where, and the parameters our wrapper relies on."""

    what: str
    why: str
    upstream: str
    remove_when: str
    versions: str = "all supported"
    stands_in_for: str = ""
    """Name of the patch this one replaces where that one's target does not exist."""

    @property
    def target(self) -> str:
        return self.seam.target


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="short_form",
        seam=Seam(
            "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
            ("target_model_config", "target_parallel_config"),
        ),
        what='Rewrites {"method": "knapspec", ...} into custom_class plus additional_config, '
        "checks the vLLM version, and obeys KNAPSPEC_DISABLE.",
        why="SpeculativeConfig.method is a closed Literal and unknown keys are refused.",
        upstream="vllm-project/vllm#36219 (proposer unification RFC, open)",
        remove_when="vLLM lets a plugin register a speculative method by name.",
    ),
    Patch(
        name="spec_method_choice",
        seam=Seam("vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",)),
        what="Adds knapspec to the choices of --spec-method.",
        why="argparse refuses the value before any config exists.",
        upstream="vllm-project/vllm#36219 (proposer unification RFC, open)",
        remove_when="vLLM lets a plugin register a speculative method by name.",
    ),
    Patch(
        name="refusals",
        seam=Seam("vllm.config.vllm:VllmConfig.__post_init__"),
        what="Raises ValueError for combinations KnapSpec cannot serve, before weights load; "
        "admits --async-scheduling where it can.",
        why="vLLM cannot know what a custom proposer does with the KV cache, and refuses "
        "asynchronous scheduling with any.",
        upstream="vllm-project/vllm#36219 (proposer unification RFC, open)",
        remove_when="custom_class proposers can validate the VllmConfig themselves.",
    ),
    Patch(
        name="lookahead",
        seam=Seam("vllm.config.vllm:VllmConfig.num_lookahead_tokens"),
        what="Reserves num_speculative_tokens KV slots past the scheduled tokens.",
        why="vLLM reserves none for custom_class, but the draft writes K/V at those positions.",
        upstream="vllm-project/vllm#39487 (custom_class) left it at 0",
        remove_when="custom_class proposers can ask for lookahead slots.",
        versions="0.32 and later, where the property exists",
    ),
    Patch(
        name="scheduler_start",
        seam=Seam("vllm.v1.core.sched.scheduler:Scheduler.__init__", ("vllm_config",)),
        what="Installs async_decision and async_feedback in a scheduler whose config selects "
        "KnapSpec; before VllmConfig.num_lookahead_tokens existed it also sets that number.",
        why="Only selected schedulers may be changed; older ones compute the number of slots "
        "themselves.",
        upstream="vllm-project/vllm#39487 (custom_class) left it at 0",
        remove_when="a proposer may choose num_spec_tokens_to_schedule, and the oldest supported "
        "vLLM has VllmConfig.num_lookahead_tokens.",
        stands_in_for="lookahead",
    ),
    Patch(
        name="request_options",
        seam=Seam("vllm.sampling_params:SamplingParams.verify", ("speculative_config",)),
        what="Refuses a request whose vllm_xargs ask for an impossible draft length.",
        why="vLLM passes extra arguments on unread; the worker that reads them can refuse nothing.",
        upstream="none: vllm_xargs are meant for extensions, which have no hook to check them",
        remove_when="vLLM lets a plugin validate a request's extra arguments.",
    ),
    Patch(
        name="worker_start",
        seam=Seam("vllm.v1.worker.worker_base:WorkerBase.__init__", ("vllm_config",)),
        what="Installs the worker patches below in a worker whose config selects KnapSpec.",
        why="Only workers may import the model runner, and only selected ones may be changed.",
        upstream="none: this is how our own patches are delayed",
        remove_when="no worker patch is left.",
    ),
    Patch(
        name="propose",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
            (
                "scheduler_output",
                "sampled_token_ids",
                "sampling_metadata",
                "spec_decode_metadata",
                "common_attn_metadata",
            ),
        ),
        what="Hands the runner and all its arguments to KnapSpecProposer.propose_full.",
        why="custom_class proposers receive no runner, no block tables and no metadata.",
        upstream="vllm-project/vllm#36219 (proposer unification RFC, open)",
        remove_when="custom_class proposers receive what EAGLE proposers receive.",
    ),
    Patch(
        name="fits_in_drafter",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter",
            ("common_attn_metadata",),
        ),
        what="Always drafts; the proposer clips each row at max_model_len itself.",
        why="One row near the limit stops drafting for the whole batch and schedules zeros as "
        "drafts for every row, which spoils the acceptance statistics.",
        upstream="not reported yet",
        remove_when="vLLM clips per row, or asks the proposer.",
    ),
    Patch(
        name="async_sampled",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states_after_model_execute",
            ("output_token_ids", "scheduler_output"),
        ),
        what="Keeps the step's sampled tokens; under --async-scheduling drafts start from them.",
        why="custom_class proposers get tokens on the host, which then does not have them.",
        upstream="vllm-project/vllm#36219 (proposer unification RFC, open)",
        remove_when="custom_class proposers receive what EAGLE proposers receive.",
    ),
    Patch(
        name="async_report",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens", ("grammar_output",)
        ),
        what="Sends what the planner has decided, and what the step took, along with its output.",
        why="Under --async-scheduling the scheduler has to know draft lengths before a step is "
        "scheduled, and with tensor parallelism it is in another process than the planner.",
        upstream="none: num_spec_tokens_to_schedule has no hook",
        remove_when="a proposer may choose num_spec_tokens_to_schedule.",
    ),
    Patch(
        name="async_decision",
        seam=Seam(
            "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
            ("scheduler_output",),
        ),
        what="Sets how many tokens a step's rows draft, and a row's own limit.",
        why="The next step is scheduled before anything of this one is known, with as many "
        "placeholders as will be drafted; vLLM takes that from a table by batch size.",
        upstream="none: num_spec_tokens_to_schedule has no hook",
        remove_when="a proposer may choose num_spec_tokens_to_schedule.",
    ),
    Patch(
        name="async_feedback",
        seam=Seam(
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
            ("scheduler_output", "model_runner_output"),
        ),
        what="Learns from a step's accepted drafts and from the times it and its drafts took.",
        why="Workers never see accepted tokens on the host under --async-scheduling.",
        upstream="none: SpecDecodingStats are sums over requests",
        remove_when="a proposer is told what was accepted of its drafts.",
    ),
    Patch(
        name="plain_sampling",
        seam=Seam(
            "vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
            ("metadata", "draft_probs", "logits", "sampling_metadata"),
        ),
        what="Samples with vLLM's plain sampler in a step for which nothing was drafted.",
        why="The rejection sampler draws random numbers for the whole vocabulary of every sampled "
        "row, drafts or not: declining at temperature 0.8 took 40% longer than plain vLLM (batch "
        "8, SmolLM2, 2-core CPU).",
        upstream="not reported yet",
        remove_when="vLLM leaves the rejection sampler out of steps without drafts.",
    ),
    Patch(
        name="plain_metadata",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._calc_spec_decode_metadata",
            ("num_draft_tokens", "cu_num_scheduled_tokens"),
        ),
        what="Writes down at once what a step without drafts verifies: nothing.",
        why="vLLM computes it with five copies to the device and two gathers.",
        upstream="not reported yet",
        remove_when="vLLM makes no SpecDecodeMetadata for steps without drafts.",
    ),
    Patch(
        name="decode_graphs",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._check_and_update_cudagraph_mode"
        ),
        what="Has CUDA graphs of whole decode steps captured for one token a row, as without "
        "speculation.",
        why="vLLM captures them for num_speculative_tokens + 1 tokens a row and pads all others to "
        "multiples of that: a declined step never replayed one, and one row took nine's time.",
        upstream="vllm-project/vllm#28207 (capture sizes of decode and mixed steps)",
        remove_when="vLLM captures whole decode steps of one token a row beside speculation.",
    ),
    Patch(
        name="capture_verify_graphs",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._capture_cudagraphs",
            ("batch_descriptors", "cudagraph_runtime_mode"),
        ),
        what="After vLLM's own graphs of whole steps: captures verify steps, of each number of "
        "tokens that a row may verify.",
        why="vLLM captures whole steps for one number of tokens a row; drafts have any length.",
        upstream="vllm-project/vllm#28207 (capture sizes of decode and mixed steps)",
        remove_when="vLLM captures whole decode steps of several numbers of tokens a row.",
    ),
    Patch(
        name="verify_graphs",
        seam=Seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding",
            (
                "num_tokens",
                "num_reqs",
                "num_scheduled_tokens_np",
                "max_num_scheduled_tokens",
                "use_cascade_attn",
                "force_eager",
                "force_uniform_decode",
            ),
        ),
        what="Has verify steps whose rows feed the same number of tokens replay those graphs.",
        why="The dispatcher knows one number of tokens a row; the pieces of a step that it chooses "
        "otherwise take longer to launch than an 8B model's step takes an H200 to compute.",
        upstream="vllm-project/vllm#28207 (capture sizes of decode and mixed steps)",
        remove_when="vLLM captures whole decode steps of several numbers of tokens a row.",
    ),
    Patch(
        name="calibrate_gpu",
        seam=Seam("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model"),
        what="After warm-up: attach the proposer to its runner and calibrate.",
        why="Cost curves need the final KV cache and captured graphs; vLLM has no hook there.",
        upstream="vllm-project/vllm#51212 (pluggable components RFC, open)",
        remove_when="vLLM calls a proposer hook after warm-up.",
    ),
    Patch(
        name="calibrate_cpu",
        seam=Seam("vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model"),
        what="As calibrate_gpu, for the CPU worker, which overrides the method.",
        why="Cost curves need the final KV cache; vLLM has no hook there.",
        upstream="vllm-project/vllm#51212 (pluggable components RFC, open)",
        remove_when="vLLM calls a proposer hook after warm-up.",
    ),
    Patch(
        name="cpu_expand",
        seam=Seam(
            "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
            ("output", "input_val", "cu_num_tokens", "replace_from", "replace_to"),
        ),
        what="Writes expanded temperature, top_k and top_p into the output tensor itself.",
        why="The original fills an int64 copy unless the output is int64, so sampled "
        "speculation on CPU reads uninitialised parameters.",
        upstream="vllm-project/vllm#55005 (open), fix vllm-project/vllm#42638 (closed unmerged)",
        remove_when="vllm-project/vllm#55005 is fixed in the oldest supported vLLM.",
        versions="all supported, CPU without Triton only",
    ),
)


def by_name(name: str) -> Patch:
    """The row called `name`; KeyError when there is none."""
    return {patch.name: patch for patch in PATCHES}[name]
