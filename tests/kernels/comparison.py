"""What the tests of the kernels compare with, and how closely."""

from __future__ import annotations

import torch

from turbo_kernels.fp8_linear import FP8_MAX, Fp8Rows


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """fp32: order of sums. bf16: one rounding of the result, at most 2^-9 of the largest value, and one before it."""
    assert out.dtype == dtype
    assert out.shape == exact.shape
    difference = (out.double() - exact.double()).abs().max() / exact.double().abs().max()
    assert float(difference) <= (2e-6 if dtype == torch.float32 else 2**-7)


def assert_rows_close(out: Fp8Rows, exact: torch.Tensor, *, amax: torch.Tensor | None = None) -> None:
    """Scales by the rows' own maxima, or one given bound; each value the nearest of e4m3, or one beside it on a tie."""
    assert out.values.dtype == torch.float8_e4m3fn
    largest = exact.double().abs().amax(-1) if amax is None else amax.double().expand(exact.shape[:-1])
    assert torch.allclose(out.scale.double(), largest / FP8_MAX, rtol=2e-2 if amax is None else 1e-6)
    scaled = exact.double() / out.scale.double()[..., None]
    binade = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp_min(2**-6))))
    close = (out.values.double() - scaled).abs() <= 0.6 * binade / 8
    if exact.device.type == "cpu":
        # triton's interpreter loses the smallest values, and the carry of a rounding into the next binade.
        close |= (scaled.abs() < 2**-5) | (scaled.abs() >= 1.93 * binade) | (scaled.abs() <= 1.001 * binade)
    assert close.all()
