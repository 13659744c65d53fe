# SPDX-License-Identifier: Apache-2.0
"""The head's most likely token, read at half the bytes or less.

A draft skips layers, never the head: of a draft forward that skips two thirds of SmolLM2-135M's
block expansion it is 13% (one row). Here every token gets a rough logit from a copy of the head in
8-bit integers, and the `CANDIDATES` highest get theirs from the head's own weights: screening,
after Chen et al., "Learning to Screen for Fast Softmax Inference on Large Vocabulary Neural
Networks" (ICLR 2019), with a smaller type of number in place of what they learn.

The product is vLLM's own of 8-bit weights and activations (per channel, per token), on every
platform for which it has one. Over 2,049 states of SmolLM2's answers its highest logit is that of
the full head for 96.5%, and the candidates hold the full head's token for all (`bench_head.py`). In
an earlier run over 11,201 states of texts its 4 highest held the token of the head in float32 for
99.97%, its 8 highest for all; rounding the logits to bfloat16 alone changes 1.8% of the tokens.
Tried and left: a shortlist of frequent tokens and those of the context (8,192 of 49,152 hold 92 to
95% of the next tokens of manuals and sources, 16,384 95 to 97%), and SVD-softmax (144 of 576
dimensions: the best is among the 256 highest for 98%, and the sum of the others' exponentials means
nothing).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.models.view import SublayerView

logger = logging.getLogger("vllm.knapspec")

CANDIDATES = 8
"""Tokens whose logits are exact."""
_PROBES = 16
"""Tokens whose own head rows are tried as states before a screen is trusted."""


class NoScreenError(ValueError):
    """This model's head, or this platform, has none; the message says why."""


def screen_of(view: SublayerView, config: KnapSpecConfig, vllm_config: Any) -> ScreenedHead | None:
    """The screen that may draft by this configuration, None for none.

    With `auto` on a CPU only: it has not been measured elsewhere. Raises NoScreenError where it was
    asked for and there is none.
    """
    on_cpu = vllm_config.device_config.device_type == "cpu"
    asked = config.draft_head == "screened"
    if config.draft_length == 0 or not (asked or (config.draft_head == "auto" and on_cpu)):
        return None
    screen, why = None, "another tensor-parallel rank has no screen"
    if vllm_config.model_config.enable_sleep_mode:
        why = "vLLM does not restore the copy of a server that slept (enable_sleep_mode)"
    else:
        try:
            screen = ScreenedHead(view)
        except Exception as error:  # whatever it is, the model's own head will do
            why = str(error) or repr(error)
    if _everywhere(screen is not None):
        return screen
    if asked:
        raise NoScreenError(f'draft_head=screened: {why}; write "draft_head": "full"')
    logger.info("KnapSpec drafts with the full head: %s", why)
    return None


def _everywhere(here: bool) -> bool:
    """Whether it is so on every tensor-parallel rank: they compare heads together."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return here
    flag = torch.tensor(int(here))
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(flag)


class ScreenedHead:
    """The rank's part of a head: of its `valid` tokens the most likely, and how likely it is.

    Holds [V, d] bytes and twice [V] float32 of its own. Weights that are loaded anew while it
    serves have a screen of their own from the next draft on where vLLM makes new products of them
    (CPUs); elsewhere they leave it stale, which costs acceptance and nothing else.
    """

    @torch.inference_mode()
    def __init__(self, view: SublayerView) -> None:
        """Raises NoScreenError."""
        target: Any = view.target
        if (why := _refusal(target)) is not None:
            raise NoScreenError(why)
        self._head, self._processor = target.lm_head, target.logits_processor
        self._first_token, self.valid = slice_of(self._head)
        if not self.valid:
            raise NoScreenError("this rank's slice of the head has no tokens")
        self.bytes = self.valid * (self._head.weight.shape[1] + 8)
        dtype = self._head.weight.dtype
        # Some of vLLM's 8-bit products take and give nothing wider.
        self._rough_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        self._copy()
        self._try()

    def _copy(self) -> None:
        self._product = getattr(self._head, "cpu_linear", None)
        self._layer = _Int8Layer(self._head.weight[: self.valid])
        self._kernel = _kernel(self._layer, self._rough_dtype)

    def partials(
        self, hidden: torch.Tensor, confident: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [T, d] -> token ids [T] int64, their logits and, if confident, the sum of
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
        token_ids += self._first_token
        if not confident:
            highest = maximum[:, 0].float()
            return token_ids, highest, torch.ones_like(highest)
        exact, rough_best, rough = (self._finished(x) for x in (exact, rough_best, rough))
        maximum = exact.amax(dim=-1, keepdim=True)
        total = (rough - maximum).exp().sum(dim=-1)
        total += ((exact - maximum).exp() - (rough_best - maximum).exp()).sum(dim=-1)
        return token_ids, maximum[:, 0], total.clamp(min=1.0)

    def rough_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, d] -> [T, valid], off by 2.5% (root mean square, SmolLM2)."""
        if getattr(self._head, "cpu_linear", None) is not self._product:
            self._copy()
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
        found, _, _ = self.partials(states, False)
        highest = logits[:, : self.valid].max(dim=-1).values.float()
        mine = logits.gather(1, found[:, None] - self._first_token)[:, 0].float()
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


def slice_of(head: Any) -> tuple[int, int]:
    """The first token of this rank's slice of a head, and how many: padding follows them."""
    first = int(head.shard_indices.org_vocab_start_index)
    return first, int(head.shard_indices.org_vocab_end_index) - first


class _Int8Layer(nn.Module):
    """weight [V, d] as vLLM's 8-bit layers have it when their checkpoint is loaded."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        scales = torch.empty(len(weight), 1, device=weight.device)
        rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for start in range(0, len(weight), 4096):  # at once it would be a second head, in float32
            rows = slice(start, start + 4096)
            part = weight[rows].float()
            scales[rows] = part.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127.0
            rounded[rows] = (part / scales[rows]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.logical_widths = [len(weight)]
        self.input_scale = self.input_zero_point = self.azp_adj = self.bias = None


def _kernel(layer: _Int8Layer, dtype: torch.dtype) -> Any:
    """vLLM's product with 8-bit weights for this platform, the layer's made ready for it."""
    from vllm.model_executor.kernels.linear import init_int8_linear_kernel

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
    finally:
        torch.set_default_dtype(usual)
    return kernel
