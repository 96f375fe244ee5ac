"""Kernels of the text encoder against exact formulas, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close, assert_rows_close, draw

from turbo_kernels.fp8_linear import Fp8Rows
from turbo_kernels.gelu_gate import gelu_gate
from turbo_kernels.relative_attention import relative_attention
from turbo_kernels.residual_rms_norm import residual_rms_norm

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(("L", "D"), [(63, 256), (5, 300)])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_residual_rms_norm(
    device: torch.device, dtype: torch.dtype, L: int, D: int, adds: bool, quantize: bool
) -> None:
    # Slices of wider rows, as the encoder's own tensors may be; a mean well away from zero, which is not taken off.
    x, y = (draw(device, dtype, L, 2 * D, seed=seed)[:, :D] + 1 for seed in (1, 2))
    weight = draw(device, dtype, D, seed=3)
    stream = (x.double() + y.double() if adds else x.double()).to(dtype).double()
    exact = stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    for provider in ("triton", "reference"):
        x_out, h = residual_rms_norm(x, y if adds else None, weight, eps=1e-6, quantize=quantize, provider=provider)
        assert torch.equal(x_out.double(), stream)
        if isinstance(h, Fp8Rows):
            assert_rows_close(h, exact)
        else:
            assert_close(h, exact, dtype)


@pytest.mark.parametrize(("L", "F_"), [(63, 256), (5, 300)])
@pytest.mark.parametrize("quantize", [False, True])
def test_gelu_gate(device: torch.device, dtype: torch.dtype, L: int, F_: int, quantize: bool) -> None:
    x = draw(device, dtype, L, 2 * F_) * 3
    gate, up = x.double().chunk(2, dim=1)
    exact = up * F.gelu(gate, approximate="tanh")
    for provider in ("triton", "reference"):
        out = gelu_gate(x, quantize=quantize, provider=provider)
        if isinstance(out, Fp8Rows):
            assert_rows_close(out, exact)
        else:
            assert_close(out, exact, dtype)


def attention_inputs(
    device: torch.device, dtype: torch.dtype, L: int, H: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = draw(device, dtype, L, 3 * H * head_dim)
    qkv[:, : H * head_dim] *= head_dim**-0.5
    return qkv, draw(device, dtype, H, 2 * L - 1, seed=1) * 2


def exact_attention(qkv: torch.Tensor, bias: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` rows, query by query."""
    L, H = qkv.shape[0], bias.shape[0]
    q, k, v = qkv.double().view(L, 3, H, -1).unbind(1)
    rows = []
    for i in range(length):
        logits = torch.einsum("hd,jhd->hj", q[i], k[:length]) + bias.double()[:, L - 1 - i : L - 1 - i + length]
        rows.append(torch.einsum("hj,jhd->hd", logits.softmax(-1), v[:length]).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(("L", "length"), [(32, 32), (96, 71), (160, 1), (111, 111)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_relative_attention(device: torch.device, dtype: torch.dtype, L: int, length: int, head_dim: int) -> None:
    qkv, bias = attention_inputs(device, dtype, L, 3, head_dim)
    exact = exact_attention(qkv, bias, length)
    for provider in ("triton", "reference"):
        counted = torch.tensor([length], dtype=torch.int32, device=device)
        out = relative_attention(qkv, bias, counted, provider=provider)
        assert out.shape == (L, 3 * head_dim)
        assert torch.isfinite(out).all()
        assert_close(out[:length], exact, dtype)


def test_padding_is_not_looked_at(device: torch.device, dtype: torch.dtype) -> None:
    qkv, bias = attention_inputs(device, dtype, 96, 2, 64)
    spoilt = qkv.clone()
    spoilt[70:] = 1000
    length = torch.tensor([70], dtype=torch.int32, device=device)
    for provider in ("triton", "reference"):
        first, second = (relative_attention(one, bias, length, provider=provider)[:70] for one in (qkv, spoilt))
        assert torch.equal(first, second)


def test_refusals() -> None:
    qkv, bias = torch.zeros(8, 384), torch.zeros(2, 15)
    length = torch.ones(1, dtype=torch.int32)
    for arguments, says in (
        ((qkv[:, :300], bias, length), r"qkv is \(8, 300\) for 2 heads"),
        ((qkv, bias[:, :14].contiguous(), length), r"bias is \(2, 14\): must be \(2, 15\)"),
        ((qkv, bias, length.long()), r"length is torch.int64"),
        ((qkv.int(), bias, length), r"qkv is torch.int32"),
    ):
        with pytest.raises(ValueError, match=says):
            relative_attention(*arguments)
    with pytest.raises(ValueError, match=r"gate_and_up has shape \(8, 385\)"):
        gelu_gate(torch.zeros(8, 385))
    with pytest.raises(ValueError, match=r"y is \(8, 383\)"):
        residual_rms_norm(qkv, qkv[:, 1:], torch.ones(384), eps=1e-6)
