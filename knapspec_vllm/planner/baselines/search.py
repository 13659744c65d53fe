# SPDX-License-Identifier: Apache-2.0
"""Bayesian optimisation over skip masks: a Gaussian process and expected improvement.

The kernel is exp(-h / length) with h the number of items in which two masks differ: the RBF kernel
on 0/1 vectors, whose squared distance is h. Its numbers are fixed, because some hundred values
with few distinct levels (hits of few tokens) do not pin them down, and because a fit that differs
in its last digit would make two runs of a benchmark two different searches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LENGTH_SHARE = 1.0
"""Kernel length as a share of the items. So long that what is learned of an item carries over to
most masks: shares from 0.5 to 2 find alike on small decoders, 0.25 and below less."""
NOISE = 1e-2
"""Of standardised values; both published searches set this."""


def suggest(masks: Tensor, values: Tensor, candidates: Tensor, count: int) -> list[int]:
    """Indices of at most `count` candidates worth trying together, the most promising first.

    masks [n, D] bool and values [n] float64: tried so far, larger is better. candidates [m, D]. A
    candidate once picked is taken to turn out as predicted, so that the next is not its twin.
    """
    count = min(count, len(candidates))
    values = (values - values.mean()) / values.std(correction=0).clamp_min(1e-9)
    mean, covariance = posterior(masks, values, candidates)
    best = float(values.max())
    picked: list[int] = []
    for _ in range(count):
        gain = _expected_improvement(mean, covariance.diagonal(), best)
        gain[picked] = -math.inf
        index = int(gain.argmax())
        picked.append(index)
        best = max(best, float(mean[index]))
        column = covariance[:, index].clone()
        covariance -= torch.outer(column, column) / (column[index] + NOISE)
    return picked


def posterior(masks: Tensor, values: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [m] and covariance [m, m] at the candidates; values [n] with mean 0 and variance 1."""
    known = kernel(masks, masks)
    known.diagonal().add_(NOISE)
    root = torch.linalg.cholesky(known)
    cross = kernel(masks, candidates)
    mean = cross.T @ torch.cholesky_solve(values.unsqueeze(1), root).squeeze(1)
    half = torch.linalg.solve_triangular(root, cross, upper=False)
    return mean, kernel(candidates, candidates) - half.T @ half


def kernel(one: Tensor, other: Tensor) -> Tensor:
    """[n, D] and [m, D] bool -> [n, m] float64."""
    one, other = one.double(), other.double()
    differing = one @ (1.0 - other).T + (1.0 - one) @ other.T
    return torch.exp(-differing / max(LENGTH_SHARE * one.shape[1], 1.0))


def _expected_improvement(mean: Tensor, variance: Tensor, best: float) -> Tensor:
    deviation = variance.clamp_min(1e-12).sqrt()
    z = (mean - best) / deviation
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return deviation * (z * torch.special.ndtr(z) + density)
