# SPDX-License-Identifier: Apache-2.0
"""Drafting with the target's own sublayers over its paged KV cache, inside vLLM."""
