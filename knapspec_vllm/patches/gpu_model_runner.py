# SPDX-License-Identifier: Apache-2.0
"""vllm.v1.worker.gpu_model_runner (which the CPU runner subclasses): call the proposer.

Imported only in workers whose config selects KnapSpec.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch

from knapspec_vllm import compat
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name


def install() -> None:
    """Wrap the methods through which the runner drafts."""
    for name, make in (
        ("propose", _make_propose),
        ("fits_in_drafter", _make_fits),
        ("async_sampled", _make_states),
        ("async_report", _make_report),
        ("plain_metadata", _make_metadata),
        ("decode_graphs", _make_graphs),
        ("capture_verify_graphs", _make_capture),
        ("verify_graphs", _make_padding),
    ):
        patch = by_name(name)
        owner, attribute = compat.resolve(patch.target)
        apply.replace(name, owner, attribute, make, patch.seam.parameters)


def drafter_of(runner: Any) -> Any | None:
    """The runner's KnapSpec proposer, or None (another method, or not the last pipeline rank)."""
    drafter = getattr(runner, "drafter", None)
    return drafter if callable(getattr(drafter, "propose_full", None)) else None


def _make_propose(original: Any) -> Any:
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = drafter_of(self)
        if drafter is None:
            return original(self, *args, **kwargs)
        # As the original does: probabilities of an older draft must not meet a newer one.
        self._draft_probs = None
        self._draft_prob_req_ids = None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if drafter.asynchronous is None:
            return drafter.propose_full(self, **given)
        return drafter.asynchronous.propose(
            given["scheduler_output"], given["common_attn_metadata"]
        )

    return propose_draft_token_ids


def _make_fits(original: Any) -> Any:
    @functools.wraps(original)
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        drafter = drafter_of(self)
        if drafter is None:
            return original(self, common_attn_metadata)  # type: ignore[no-any-return]
        if drafter.asynchronous is not None:
            # The one moment after sampling and before vLLM's own bookkeeping.
            drafter.asynchronous.publish()
        return common_attn_metadata is not None

    return _input_fits_in_drafter


def _make_metadata(original: Any) -> Any:
    @functools.wraps(original)
    def _calc_spec_decode_metadata(
        self: Any, num_draft_tokens: Any, cu_num_scheduled_tokens: Any
    ) -> Any:
        if drafter_of(self) is None or num_draft_tokens.any():
            return original(self, num_draft_tokens, cu_num_scheduled_tokens)
        return _without_drafts(cu_num_scheduled_tokens, self.device)

    return _calc_spec_decode_metadata


def _without_drafts(cu_num_scheduled_tokens: Any, device: torch.device) -> Any:
    """vLLM's SpecDecodeMetadata of a step that verifies nothing: a token from each row's last."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    rows = len(cu_num_scheduled_tokens)
    last = torch.from_numpy(cu_num_scheduled_tokens - 1)
    if device.type != "cpu":  # from pageable memory the copy would wait for the device
        last = last.pin_memory().to(device, non_blocking=True)
    none, zeros, rising, counts = _numbers(rows, device)
    return SpecDecodeMetadata(
        draft_token_ids=none,
        num_draft_tokens=[0] * rows,
        cu_num_draft_tokens=zeros,
        cu_num_sampled_tokens=counts,
        target_logits_indices=none,
        bonus_logits_indices=rising,
        logits_indices=last,
    )


@functools.lru_cache(maxsize=64)
def _numbers(rows: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """int32 on the device: nothing, zeros, 0 to rows - 1, and 1 to rows. Only read."""
    rising = torch.arange(rows, dtype=torch.int32, device=device)
    return rising[:0], torch.zeros_like(rising), rising, rising + 1


def _make_graphs(original: Any) -> Any:
    @functools.wraps(original)
    def _check_and_update_cudagraph_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
        if drafter_of(self) is not None:
            for holder in (self, self.cudagraph_dispatcher):
                holder.uniform_decode_query_len = 1
        return original(self, *args, **kwargs)

    return _check_and_update_cudagraph_mode


def _make_capture(original: Any) -> Any:
    @functools.wraps(original)
    def _capture_cudagraphs(
        self: Any, batch_descriptors: Any, cudagraph_runtime_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        whole = cudagraph_runtime_mode.name == "FULL" and batch_descriptors[:1]
        result = original(self, batch_descriptors, cudagraph_runtime_mode, *args, **kwargs)
        drafter = drafter_of(self)
        if drafter is not None and whole and whole[0].uniform:
            drafter.verify_graphs.capture(
                self, lambda batch: self._warmup_and_capture(batch, cudagraph_runtime_mode)
            )
        return result

    return _capture_cudagraphs


def _make_padding(original: Any) -> Any:
    @functools.wraps(original)
    def _determine_batch_execution_and_padding(
        self: Any,
        num_tokens: int,
        num_reqs: int,
        num_scheduled_tokens_np: Any,
        max_num_scheduled_tokens: int,
        use_cascade_attn: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        found = original(
            self, num_tokens, num_reqs, num_scheduled_tokens_np, max_num_scheduled_tokens,
            use_cascade_attn, *args, **kwargs,
        )  # fmt: skip
        drafter = drafter_of(self)
        if drafter is None or use_cascade_attn or kwargs.get("force_eager"):
            return found
        # A dummy step says whether it stands for a uniform one.
        if max_num_scheduled_tokens == 1 or kwargs.get("force_uniform_decode") is False:
            return found
        batch = drafter.verify_graphs.find(num_tokens, num_reqs, max_num_scheduled_tokens)
        if batch is None:
            return found
        from vllm.config import CUDAGraphMode

        *others, stats = found[2:]
        if stats is not None:
            stats = dataclasses.replace(
                stats,
                num_padded_tokens=batch.num_tokens,
                num_paddings=batch.num_tokens - num_tokens,
                runtime_mode=str(CUDAGraphMode.FULL),
            )
        return CUDAGraphMode.FULL, batch, *others, stats

    return _determine_batch_execution_and_padding


def _make_states(original: Any) -> Any:
    @functools.wraps(original)
    def _update_states_after_model_execute(
        self: Any, output_token_ids: Any, scheduler_output: Any
    ) -> Any:
        drafter = drafter_of(self)
        if drafter is not None and drafter.asynchronous is not None:
            drafter.asynchronous.sampled(output_token_ids)
        return original(self, output_token_ids, scheduler_output)

    return _update_states_after_model_execute


def _make_report(original: Any) -> Any:
    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        drafter = drafter_of(self)
        if drafter is None or drafter.asynchronous is None:
            return output
        return drafter.asynchronous.reported(output)

    return sample_tokens
