# SPDX-License-Identifier: Apache-2.0
"""The head's most likely token, read at half the bytes or less.

A draft skips layers, never the head: of a draft forward of SmolLM2-135M's block expansion it is 13%
(one row), of a light plan of the model itself a third. Here every token gets a rough logit from a
copy of the head in 8-bit integers, and the `CANDIDATES` highest get theirs from the head's own
weights: screening, after Chen et al., "Learning to Screen for Fast Softmax Inference on Large
Vocabulary Neural Networks" (ICLR 2019), with a smaller type of number in place of what they learn.

The product is vLLM's own of 8-bit weights and activations (per channel, per token), on every
platform for which it has one. Over 11,201 states of SmolLM2 its highest logit is that of the head
in float32 for 95.8%, among its 4 highest it is for 99.97% and among 8 for all, where rounding the
logits to bfloat16 alone leaves 98.2%. Tried and left: a shortlist of frequent tokens and those of
the context (8,192 of 49,152 hold 92 to 95% of the next tokens of manuals and sources, 16,384 95 to
97%), and SVD-softmax (144 of 576 dimensions: the best is among the 256 highest for 98%, and
the sum of the others' exponentials means nothing).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from knapspec_vllm.config import KnapSpecConfig, leaves_no_choice
from knapspec_vllm.models.view import SublayerView

logger = logging.getLogger("vllm.knapspec")

CANDIDATES = 8
"""Tokens whose logits are exact."""
_PROBES = 16
"""Tokens whose own head rows are tried as states before a screen is trusted."""


class NoScreenError(ValueError):
    """This model's head, or this platform, has none; the message says why."""


def screen_of(view: SublayerView, config: KnapSpecConfig, on_cpu: bool) -> ScreenedHead | None:
    """The screen that may draft by this configuration, None for none.

    With `auto` one that calibration can compare with the head itself, and on a CPU only: it has not
    been measured elsewhere. Raises NoScreenError where it was asked for and there is none.
    """
    if config.draft_head == "auto":
        compared = config.calibration != "off" and not leaves_no_choice(
            config.plan, config.draft_length
        )
        if not (on_cpu and compared):
            return None
    elif config.draft_head == "full":
        return None
    try:
        return ScreenedHead(view)
    except NoScreenError as error:
        if config.draft_head == "screened":
            raise NoScreenError(
                f'draft_head=screened: {error}; write "draft_head": "full"'
            ) from error
        logger.info("KnapSpec drafts with the full head: %s", error)
        return None


class ScreenedHead:
    """The rank's part of a head: of its `valid` tokens the most likely, and how likely it is.

    Holds [V, d] bytes and [V] float32 of its own. Weights that vLLM loads anew later make the rough
    logits stale, not the exact ones.
    """

    @torch.inference_mode()
    def __init__(self, view: SublayerView) -> None:
        """Raises NoScreenError."""
        target: Any = view.target
        if (why := _refusal(target)) is not None:
            raise NoScreenError(why)
        self._head, self._processor = target.lm_head, target.logits_processor
        self.valid = _valid(self._head)
        self._layer = _Int8Layer(self._head.weight[: self.valid])
        self.bytes = self.valid * (self._head.weight.shape[1] + 4)
        dtype = self._head.weight.dtype
        # Some of vLLM's 8-bit products take and give nothing wider.
        self._rough_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        self._kernel = _kernel(self._layer, self._rough_dtype)
        self._try()

    def partials(
        self, hidden: torch.Tensor, confident: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [T, d] -> local token ids [T] int64, their logits and, if confident, the sum of
        exp(logit - maximum) over the rank's tokens, [T] float32 each; else ones.

        Of candidates with equal logits the first wins, as in the head itself. Only the candidates'
        part of the sum is exact.
        """
        rough = self.rough_logits(hidden)
        rough_best, candidates = rough.topk(min(CANDIDATES, self.valid), dim=-1)
        # Rounded to the model's type, as the target's are: what is a tie there is one here.
        products = self._head.weight[candidates] * hidden.float()[:, None]
        exact = products.sum(dim=-1).to(hidden.dtype)
        maximum = exact.amax(dim=-1, keepdim=True)
        token_ids = candidates.masked_fill(exact < maximum, self.valid).amin(dim=-1)
        if not confident:
            nothing = maximum[:, 0].float()
            return token_ids, nothing, torch.ones_like(nothing)
        exact, rough_best, rough = (self._finished(x) for x in (exact, rough_best, rough))
        maximum = exact.amax(dim=-1, keepdim=True)
        total = (rough - maximum).exp().sum(dim=-1)
        total += ((exact - maximum).exp() - (rough_best - maximum).exp()).sum(dim=-1)
        return token_ids, maximum[:, 0], total.clamp(min=1.0)

    def rough_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, d] -> [T, valid], off by 2.5% (root mean square, SmolLM2)."""
        return self._kernel.apply_weights(self._layer, hidden.to(self._rough_dtype))

    def _finished(self, logits: torch.Tensor) -> torch.Tensor:
        """As vLLM's logits processor leaves them, float32."""
        logits, cap = logits.float(), self._processor.soft_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits * self._processor.scale

    def _try(self) -> None:
        """Of vLLM's 8-bit kernels there are many, and this is not the use they are tested in."""
        chosen = torch.linspace(0, self.valid - 1, _PROBES, device=self._head.weight.device).long()
        states = self._head.weight[chosen]
        states = states / states.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)
        states = (states * states.shape[-1] ** 0.5).to(self._head.weight.dtype)
        logits = self._head.quant_method.apply(self._head, states)
        try:
            found, _, _ = self.partials(states, False)
        except RuntimeError as error:
            raise NoScreenError(f"vLLM's 8-bit product does not take it: {error}") from error
        highest = logits[:, : self.valid].max(dim=-1).values.float()
        mine = logits.gather(1, found[:, None])[:, 0].float()
        # Not the ids: of rows of a head that are alike, any is as good.
        if not torch.allclose(mine, highest, rtol=0.02, atol=1e-3):
            raise NoScreenError("its rough logits do not lead to the head's highest ones")


def _refusal(target: Any) -> str | None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    head: Any = getattr(target, "lm_head", None)
    processor: Any = getattr(target, "logits_processor", None)
    if type(processor) is not LogitsProcessor or processor.logits_as_input:
        return "the model has no logits processor of vLLM's own"
    if type(getattr(head, "quant_method", None)) is not UnquantizedEmbeddingMethod:
        return "its head is quantised or wrapped"
    if getattr(head, "bias", None) is not None:
        return "its head has a bias"
    if not processor.scale > 0:
        return f"its logits are scaled by {processor.scale}"
    weight = head.weight
    if weight.dim() != 2 or not weight.numel():
        return "vLLM does not keep its weights as they are"
    if getattr(processor, "head_dtype", None) not in (None, weight.dtype):
        return f"its logits are computed in {processor.head_dtype}"
    return None


def _valid(head: Any) -> int:
    """Rows of this rank's weight that are tokens; padding follows them."""
    shard = head.shard_indices
    return int(shard.org_vocab_end_index - shard.org_vocab_start_index)


class _Int8Layer(nn.Module):
    """weight [V, d] as vLLM's 8-bit layers have it when their checkpoint is loaded."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        scales = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-8) / 127.0
        rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for start in range(0, len(weight), 4096):  # the quotients have four bytes each
            rows = slice(start, start + 4096)
            rounded[rows] = (weight[rows].float() / scales[rows]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.logical_widths = [len(weight)]
        self.input_scale = self.input_zero_point = self.azp_adj = self.bias = None


def _kernel(layer: _Int8Layer, dtype: torch.dtype) -> Any:
    """vLLM's product with 8-bit weights for this platform, the layer's made ready for it."""
    try:
        from vllm.model_executor.kernels.linear import init_int8_linear_kernel
    except ImportError as error:
        raise NoScreenError(f"this vLLM has no 8-bit product where 0.32 has it: {error}") from None
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of the product, on a CPU
    try:
        kernel = init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name="KnapSpec's draft head",
        )
        kernel.process_weights_after_loading(layer)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise NoScreenError(f"vLLM has no 8-bit product for it here: {error}") from error
    finally:
        torch.set_default_dtype(usual)
    return kernel
