# SPDX-License-Identifier: Apache-2.0
"""vllm.sampling_params: a request's own draft length is checked before it is admitted."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from knapspec_vllm import compat, request_options
from knapspec_vllm.patches import apply
from knapspec_vllm.patches.ledger import by_name
from knapspec_vllm.patches.selection import drafts_with_knapspec


def install() -> None:
    """Wrap SamplingParams.verify."""
    patch = by_name("request_options")
    owner, attribute = compat.resolve(patch.target)
    apply.replace(patch.name, owner, attribute, _make_verify, patch.seam.parameters)


def _check(extra_args: Any) -> None:
    """Raises what vLLM answers with status 400; a plain ValueError would be an error of ours."""
    from vllm.exceptions import VLLMValidationError

    try:
        request_options.check(extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _make_verify(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def verify(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        if self.extra_args and drafts_with_knapspec(given["speculative_config"]):
            _check(self.extra_args)

    return verify
