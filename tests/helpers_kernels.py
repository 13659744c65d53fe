# SPDX-License-Identifier: Apache-2.0
"""Comparison of a kernel's result with what it should be, told so that a failure can be read."""

import torch


def assert_close(
    name: str, want: torch.Tensor, got: torch.Tensor, tolerance: float, relative: float = 0.0
) -> None:
    """|got - want| <= tolerance + relative * |want| everywhere, and finite in the same places."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    want, got = want.detach().double().cpu(), got.detach().double().cpu()
    assert torch.equal(want.isfinite(), got.isfinite()), f"{name}: not finite in other places"
    error = torch.where(want.isfinite(), (got - want).abs(), torch.zeros_like(want))
    wrong = error > tolerance + relative * want.abs()
    if not bool(wrong.any()):
        return
    rms = (error.square().mean() / want.square().mean().clamp_min(1e-300)).sqrt()
    places = [tuple(place) for place in wrong.nonzero()[:5].tolist()]
    shown = ", ".join(f"{place}: {got[place]:.6g} for {want[place]:.6g}" for place in places)
    raise AssertionError(
        f"{name}: {int(wrong.sum())} of {wrong.numel()} differ by more than {tolerance:g} "
        f"(+ {relative:g} relative); max {error.max():.3g}, RMS-relative {rms:.3g}; {shown}"
    )
