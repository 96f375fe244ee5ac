"""Convolutions and norms of the video VAE against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from turbo_kernels import conv3d, upsample_conv
from turbo_kernels.conv3d import causal_conv3d, conv_weights
from turbo_kernels.norm_silu import norm_silu
from turbo_kernels.upsample_conv import upsample_weights

pytestmark = pytest.mark.oracle


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """fp32: order of sums. bf16: a rounding of the result, at most 2^-9 of the largest value, and one of its norm."""
    assert out.dtype == dtype
    assert out.shape == exact.shape
    difference = (out.double() - exact).abs().max() / exact.abs().max()
    assert float(difference) <= (2e-6 if dtype == torch.float32 else 2**-7)


def exact_norm_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return F.silu(x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) * gamma.double() * x.shape[-1] ** 0.5)


def exact_conv(window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    out = F.conv3d(window.double().permute(3, 0, 1, 2)[None], weight.double(), bias.double(), padding=(0, 1, 1))
    return out[0].permute(1, 2, 3, 0)


def places(ring: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return ring[[(first + i) % len(ring) for i in range(count)]]


@pytest.fixture(params=[False, True], ids=["small", "large"])
def shared_memory(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both families of tilings, whatever runs the test."""
    if device.type == "cpu" or not request.param:
        for module in (conv3d, upsample_conv):
            monkeypatch.setattr(module, "has_large_shared_memory", lambda x: request.param)


# T, H, W, C_in, C_out: one, two and four frames; sizes that leave every tile ragged; each split of the columns.
@pytest.mark.parametrize(
    ("T", "H", "W", "C", "N"),
    [
        (1, 5, 19, 16, 16),
        (2, 3, 35, 32, 96),
        (4, 3, 17, 96, 96),
        (2, 3, 5, 32, 192),
        (4, 3, 9, 32, 3),
        (3, 2, 7, 16, 48),
    ],
)
def test_causal_conv3d(
    device: torch.device, dtype: torch.dtype, shared_memory: None, T: int, H: int, W: int, C: int, N: int
) -> None:
    ring, first = draw(device, dtype, T + 3, H, W, C), 3
    weight = draw(device, dtype, N, C, 3, 3, 3, seed=1) / (27 * C) ** 0.5
    bias, gamma = draw(device, dtype, N, seed=2), draw(device, torch.float32, N, seed=3)
    residual = draw(device, dtype, T, H, W, N, seed=4)
    weights = conv_weights(weight, bias)
    plain = exact_conv(places(ring, first, T + 2), weight, bias)
    for provider in ("triton", "reference"):
        out = causal_conv3d(ring, weights, first=first, num_frames=T, provider=provider)
        assert out is not None
        assert_close(out, plain, dtype)
        for keep in (True, False):
            norm_out = torch.full((T + 2, H, W, N), 7.0, dtype=dtype, device=device)
            out = causal_conv3d(
                ring, weights, first=first, num_frames=T, residual_THWC=residual, gamma_C=gamma, keep_output=keep,
                norm_out_RHWC=norm_out, norm_first=T + 1, provider=provider,
            )  # fmt: skip
            exact = plain + residual.double()
            assert_close(places(norm_out, T + 1, T), exact_norm_silu(exact, gamma), dtype)
            assert bool((places(norm_out, 2 * T + 1, 2) == 7).all()), "the other frames of the ring are untouched"
            assert (out is not None) == keep
            if out is not None:
                assert_close(out, exact, dtype)


@pytest.mark.parametrize(("T", "H", "W", "C", "N"), [(2, 5, 19, 16, 16), (1, 9, 20, 64, 96), (2, 3, 9, 32, 192)])
def test_upsample_conv(
    device: torch.device, dtype: torch.dtype, shared_memory: None, T: int, H: int, W: int, C: int, N: int
) -> None:
    # Frames as a convolution in time leaves them: every second group of channels.
    x = draw(device, dtype, T, H, W, 2, C)[..., 1, :]
    weight = draw(device, dtype, N, C, 3, 3, seed=1) / (9 * C) ** 0.5
    bias, gamma = draw(device, dtype, N, seed=2), draw(device, torch.float32, N, seed=3)
    weights = upsample_weights(weight, bias)
    doubled = x.double().repeat_interleave(2, 1).repeat_interleave(2, 2).permute(0, 3, 1, 2)
    exact = F.conv2d(doubled, weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    for provider in ("triton", "reference"):
        assert_close(upsample_conv.upsample_conv(x, weights, provider=provider), exact, dtype)
        norm_out = torch.full((T + 1, 2 * H, 2 * W, N), 7.0, dtype=dtype, device=device)
        out = upsample_conv.upsample_conv(
            x, weights, gamma_C=gamma, norm_out_RHWC=norm_out, norm_first=T, provider=provider
        )
        assert_close(out, exact, dtype)
        assert_close(places(norm_out, T, T), exact_norm_silu(exact, gamma), dtype)
        assert bool((places(norm_out, 2 * T, 1) == 7).all())


@pytest.mark.parametrize("C", [3, 96, 200])
def test_norm_silu(device: torch.device, dtype: torch.dtype, C: int) -> None:
    x, gamma = draw(device, dtype, 3, 5, 7, C), draw(device, torch.float32, C, seed=1)
    x[0, 1, 2] = 0
    exact = exact_norm_silu(x, gamma)
    for provider in ("triton", "reference"):
        assert_close(norm_silu(x, gamma, provider=provider), exact, dtype)
        inplace = x.clone()
        assert norm_silu(inplace, gamma, out=inplace, provider=provider) is inplace
        assert_close(inplace, exact, dtype)


def test_refusals() -> None:
    weights = conv_weights(torch.zeros(16, 16, 3, 3, 3), torch.zeros(16))
    ring = torch.zeros(4, 2, 2, 16)
    with pytest.raises(ValueError, match="16 n, 3, 3, 3"):
        conv_weights(torch.zeros(16, 8, 3, 3, 3), torch.zeros(16))
    with pytest.raises(ValueError, match="bias"):
        conv_weights(torch.zeros(16, 16, 3, 3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="do not fit a ring of 4"):
        causal_conv3d(ring, weights, first=0, num_frames=3)
    with pytest.raises(ValueError, match=r"R, H, W, 16"):
        causal_conv3d(ring[..., :8], weights, first=0, num_frames=2)
    with pytest.raises(ValueError, match="together"):
        causal_conv3d(ring, weights, first=0, num_frames=2, keep_output=False)
    with pytest.raises(ValueError, match="residual"):
        causal_conv3d(ring, weights, first=0, num_frames=2, residual_THWC=ring)
    with pytest.raises(ValueError, match="filters"):
        causal_conv3d(ring.half(), weights, first=0, num_frames=2)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        causal_conv3d(ring, weights, first=0, num_frames=2, provider="triton")
    with pytest.raises(ValueError, match="16 m, 16 n, 3, 3"):
        upsample_weights(torch.zeros(16, 8, 3, 3), torch.zeros(16))
    with pytest.raises(ValueError, match="together"):
        upsample_conv.upsample_conv(
            ring, upsample_weights(torch.zeros(16, 16, 3, 3), torch.zeros(16)), gamma_C=torch.zeros(16)
        )
    with pytest.raises(ValueError, match="gamma"):
        norm_silu(ring, torch.zeros(3))
