"""The VAE's building blocks against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from turbo_backend.nets.vae_layers import (
    CausalConv3d,
    FrameAttention,
    FrameHistory,
    ResidualBlock,
    attend_by_convolution,
    convolve,
    norm_silu,
    rms_norm,
)


@pytest.mark.parametrize("num_frames", [1, 3, 6])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_convolve_is_conv3d(num_frames: int, kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x_THWC = torch.randn(num_frames, 7, 5, 6)
    weight, bias = torch.randn(4, 6, *kernel) * 0.2, torch.randn(4)
    padding = (kernel[1] // 2, kernel[2] // 2)
    x_1CTHW = x_THWC.permute(3, 0, 1, 2)[None]
    if num_frames == 1:
        x_1CTHW = F.pad(x_1CTHW, (0, 0, 0, 0, kernel[0] - 1, 0))
    expected = F.conv3d(x_1CTHW, weight, bias, padding=(0, *padding))[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(convolve(x_THWC, weight, bias, padding=padding), expected, rtol=1e-5, atol=1e-5)


def test_convolve_strides() -> None:
    torch.manual_seed(0)
    x_THWC = torch.randn(5, 9, 11, 6)
    weight, bias = torch.randn(4, 6, 3, 3, 3) * 0.2, torch.randn(4)
    expected = F.conv3d(x_THWC.permute(3, 0, 1, 2)[None], weight, bias, stride=2)[0].permute(1, 2, 3, 0)
    out = convolve(x_THWC, weight, bias, padding=(0, 0), stride=2, time_stride=2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_norm_silu_formula_and_zero_vectors() -> None:
    torch.manual_seed(0)
    x_THWC, gamma = torch.randn(2, 3, 5, 48), torch.randn(48, 1, 1, 1)
    x_THWC[0, 1, 2] = 0.0
    x_double = x_THWC.double()
    norm = x_double.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    normed = x_double / norm * 48**0.5 * gamma.double().view(48)
    expected = (normed * torch.sigmoid(normed)).float()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(rms_norm(x_THWC, gamma), normed.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(norm_silu(x_THWC, gamma), expected, rtol=1e-5, atol=1e-6)
            out = torch.full_like(x_THWC, float("nan"))
            assert norm_silu(x_THWC, gamma, out=out) is out
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("splits", [(1, 1, 1, 1, 1, 1, 1), (1, 4, 2), (3, 4), (2, 1, 4)])
def test_causal_convolution_in_chunks(splits: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(4, 6)
    x_THWC = torch.randn(7, 6, 5, 4)
    padded = F.pad(x_THWC.permute(3, 0, 1, 2)[None], (1, 1, 1, 1, 2, 0))
    expected = F.conv3d(padded, conv.weight, conv.bias)[0].permute(1, 2, 3, 0)
    history = FrameHistory()
    chunks = []
    for i_chunk, chunk in enumerate(x_THWC.split(splits)):
        if i_chunk == len(splits) - 1:
            history.finish()
        chunks.append(conv(chunk, history))
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-5, atol=1e-5)
    assert not history.has_started(conv), "the last chunk frees the layer's past"


def test_attention_stays_within_frames() -> None:
    torch.manual_seed(0)
    attention = FrameAttention(32)
    x_THWC = torch.randn(3, 4, 5, 32)
    q, k, v = attention.to_qkv(rms_norm(x_THWC, attention.norm.gamma)).reshape(3, 20, 96).split(32, dim=-1)
    attended = torch.softmax(q @ k.mT / 32**0.5, dim=-1) @ v
    expected = x_THWC + attention.proj(attended.reshape(3, 4, 5, 32))
    torch.testing.assert_close(attention(x_THWC), expected, rtol=1e-5, atol=1e-5)


def test_blocks_are_differentiable_outside_inference_mode() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(4, 8)
    x_THWC = torch.randn(2, 4, 4, 4)
    history = FrameHistory()
    loss = block(x_THWC, history).square().mean() + block(x_THWC, history).square().mean()
    loss.backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name
    with torch.inference_mode():
        history = FrameHistory()
        again = block(x_THWC, history).square().mean() + block(x_THWC, history).square().mean()
    torch.testing.assert_close(again, loss.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.oracle
def test_attention_by_convolution() -> None:
    q, k, v = (torch.randn(2, 1, 35, 16, generator=torch.Generator().manual_seed(seed)) * 2 for seed in range(3))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attend_by_convolution(q, k, v).double(), expected, rtol=1e-5, atol=1e-5)
