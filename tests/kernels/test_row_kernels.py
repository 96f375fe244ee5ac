"""Norms, gates and the int8 linear layer against their references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import draw

import turbo_kernels as kernels
from turbo_kernels.int8_linear import dequantize_int8_blockwise
from turbo_kernels.residual_norm import gate_residual, layer_norm_modulate, residual_norm
from turbo_kernels.self_check_ops import relative_error

pytestmark = pytest.mark.oracle


def limit(dtype: torch.dtype) -> float:
    """fp32: order of sums. bf16: one rounding of the result, at most 2^-9 of the largest value."""
    return 1e-6 if dtype == torch.float32 else 2**-8


def assert_close(out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    assert out.shape == reference.shape
    difference = (out.float() - reference.float()).abs().max() / reference.float().abs().max()
    assert float(difference) <= limit(dtype)


@pytest.mark.parametrize(("L", "D", "num_heads"), [(63, 256, 4), (111, 384, 3), (5, 2, 1)])
@pytest.mark.parametrize("rotate", [False, True])
def test_rms_norm_rope(device: torch.device, dtype: torch.dtype, L: int, D: int, num_heads: int, rotate: bool) -> None:
    """Read through the strides of one joint projection."""
    _, x, _ = draw(device, dtype, 2, L, 3 * D).chunk(3, dim=-1)
    weight = draw(device, dtype, D, seed=1)
    head_dim = D // num_heads
    angles = torch.rand(L, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 6.3
    rope = torch.stack((angles.cos(), angles.sin()), -1).to(device) if rotate else None
    exact = F.rms_norm(x.double(), (D,), weight.double(), 1e-6).view(2, L, num_heads, head_dim)
    if rotate:
        turned = torch.view_as_complex(exact.view(2, L, num_heads, -1, 2)) * torch.polar(
            torch.ones_like(angles), angles
        ).to(device)[:, None].to(torch.complex128)
        exact = torch.view_as_real(turned).flatten(-2)
    for provider in ("triton", "reference"):
        out = kernels.rms_norm_rope(x, weight, rope, num_heads=num_heads, eps=1e-6, provider=provider)
        assert out.is_contiguous()
        assert_close(out, exact, dtype)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("modulate", [False, True])
def test_norm_of_the_plain_block(device: torch.device, dtype: torch.dtype, affine: bool, modulate: bool) -> None:
    L, D = 63, 384
    x = draw(device, dtype, 2, L, D) + 3
    weight, bias = (draw(device, dtype, D, seed=s) if affine else None for s in (1, 2))
    scale, shift = (draw(device, dtype, 2, D, seed=s) if modulate else None for s in (3, 4))
    out = layer_norm_modulate(x, weight=weight, bias=bias, scale_BD=scale, shift_BD=shift, eps=1e-6)
    exact = x.double() - x.double().mean(-1, keepdim=True)
    exact = exact / (x.double().var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    if weight is not None and bias is not None:
        exact = exact * weight.double() + bias.double()
    if scale is not None and shift is not None:
        exact = exact * (1 + scale.double()[:, None]) + shift.double()[:, None]
    assert_close(out, exact, dtype)


@pytest.mark.parametrize("L", [63, 111])
@pytest.mark.parametrize("D", [256, 384])
def test_gate_of_the_plain_block(device: torch.device, dtype: torch.dtype, L: int, D: int) -> None:
    x, y, gate = (draw(device, dtype, *shape, seed=s) for s, shape in enumerate(((2, L, D), (2, L, D), (2, D))))
    assert_close(gate_residual(x, y, gate), x.double() + y.double() * gate.double()[:, None], dtype)


@pytest.mark.parametrize(("M", "K"), [(63, 256), (200, 200), (257, 128)])
def test_quantize_int8_blockwise(device: torch.device, dtype: torch.dtype, M: int, K: int) -> None:
    x = draw(device, dtype, M, K)
    x8, scale = kernels.quantize_int8_blockwise(x, provider="triton")
    expected8, expected_scale = kernels.quantize_int8_blockwise(x, provider="reference")
    assert torch.equal(scale, expected_scale)
    assert torch.equal(x8, expected8)
    step = scale.repeat_interleave(128, 0)[:M].repeat_interleave(128, 1)[:, :K]
    # Half a step, but for the largest value of a block: 128 saturates to 127.
    assert ((dequantize_int8_blockwise(x8, scale) - x.float()).abs() <= 1.01 * step).all()


def test_quantize_int8_rounds_halves_to_even_and_saturates(device: torch.device) -> None:
    row = torch.tensor([128.0, -128.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], device=device)
    expected = [127, -128, 0, 2, 2, 0, -2, 126]
    for provider in ("triton", "reference"):
        x8, scale = kernels.quantize_int8_blockwise(row[None], provider=provider)
        assert x8[0].tolist() == expected
        assert scale.item() == 1.0


@pytest.mark.parametrize(("L", "K", "N"), [(63, 256, 200), (200, 128, 128), (257, 200, 72)])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_linear(device: torch.device, dtype: torch.dtype, L: int, K: int, N: int, biased: bool) -> None:
    x, weight = draw(device, dtype, 2, L, K), draw(device, dtype, N, K, seed=1)
    bias = draw(device, dtype, N, seed=2) if biased else None
    weight8 = kernels.quantize_int8_blockwise(weight)
    out = kernels.int8_linear(x, *weight8, bias, provider="triton")
    assert_close(out, kernels.int8_linear(x.float(), *weight8, bias, provider="reference"), dtype)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative_error(out, exact) <= 0.03  # both operands keep amax / 128 of about 4.4 sigma: 1.4 %


@pytest.mark.parametrize("provider", ["triton", "reference"])
def test_a_sample_does_not_see_its_batch(device: torch.device, dtype: torch.dtype, provider: str) -> None:
    x, gate = draw(device, dtype, 3, 63, 256), draw(device, dtype, 3, 256, seed=1)
    x[1] *= 50  # a neighbour of another scale
    weight8 = kernels.quantize_int8_blockwise(draw(device, dtype, 200, 256, seed=2), provider=provider)

    def add_and_norm(s: slice) -> torch.Tensor:
        modulation = {"scale_BD": gate[s], "shift_BD": gate[s]}
        return torch.stack(residual_norm(x[s], x[s], gate[s], **modulation, eps=1e-6, provider=provider), dim=1)

    ops = (
        lambda s: kernels.int8_linear(x[s], *weight8, None, provider=provider),
        lambda s: kernels.rms_norm_rope(x[s], gate[0], None, num_heads=4, eps=1e-6, provider=provider),
        add_and_norm,
    )
    for op in ops:
        batch = op(slice(None))
        for i in range(3):
            assert torch.equal(batch[i : i + 1], op(slice(i, i + 1)))
