"""Kernels of the fused transformer block against exact formulas, in the interpreter and on a GPU."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close, assert_rows_close, draw

from turbo_kernels import fp8_linear as fp8_linear_module
from turbo_kernels.fp8_gelu_linear import Fp8Samples, ffn_bounds, fp8_gelu_linear, multiplies_gelu_fp8
from turbo_kernels.fp8_linear import FP8_MAX, Fp8Rows, fp8_linear, multiplies_fp8, quantize_fp8_rows, row_pieces
from turbo_kernels.residual_norm import residual_norm
from turbo_kernels.text_attention import TextRows, rows_compiled_for, text_attention

pytestmark = pytest.mark.oracle


def test_pieces_of_a_row() -> None:
    assert [row_pieces(size) for size in (2, 256, 1536, 5120, 8960)] == [
        (1, 1), (128, 128), (1024, 512), (4096, 1024), (8192, 1024),
    ]  # fmt: skip


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("L", "K"), [(63, 256), (9, 300), (3, 1536)])
def test_quantize_fp8_rows(device: torch.device, dtype: torch.dtype, L: int, K: int, gelu: bool) -> None:
    x = draw(device, dtype, 2, L, K) * torch.logspace(-3, 3, L, device=device, dtype=dtype)[:, None]
    x[0, 1] = 0
    exact = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    for provider in ("triton", "reference"):
        out = quantize_fp8_rows(x, gelu=gelu, provider=provider)
        assert (out.values[0, 1].float() == 0).all()
        kept = torch.ones(2, L, dtype=torch.bool, device=device)
        kept[0, 1] = False
        assert_rows_close(Fp8Rows(out.values[kept], out.scale[kept]), exact[kept])


@pytest.mark.parametrize(("L", "D"), [(7, 256), (5, 384), (3, 1536)])
@pytest.mark.parametrize("branch", ["none", "plain", "gated"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("modulate", [False, True])
def test_residual_norm(
    device: torch.device, dtype: torch.dtype, L: int, D: int, branch: str, affine: bool, modulate: bool
) -> None:
    # A mean well away from zero: padded lanes counted into the variance would show.
    x, y, gate = (
        draw(device, dtype, 2, L, D) + 3,
        draw(device, dtype, 2, L, D, seed=1),
        draw(device, dtype, 2, D, seed=2),
    )
    weight, bias = (draw(device, torch.float32, D, seed=s) if affine else None for s in (3, 4))
    scale, shift = (draw(device, torch.float32, 2, D, seed=s) if modulate else None for s in (5, 6))
    parameters = {"weight": weight, "bias": bias, "scale_BD": scale, "shift_BD": shift, "eps": 1e-6}
    added = (None if branch == "none" else y, gate if branch == "gated" else None)
    stream = x.double()
    if branch != "none":
        stream = stream + y.double() * (gate.double()[:, None] if branch == "gated" else 1)
    stream = stream.to(dtype).double()
    h = (stream - stream.mean(-1, keepdim=True)) / (stream.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    if weight is not None and bias is not None:
        h = h * weight.double() + bias.double()
    if scale is not None and shift is not None:
        h = h * (1 + scale.double()[:, None]) + shift.double()[:, None]
    for provider in ("triton", "reference"):
        x_out, out = residual_norm(x, *added, **parameters, provider=provider)
        assert isinstance(out, torch.Tensor)
        assert_close(x_out, stream, dtype)
        assert_close(out, h, dtype)
        _, out = residual_norm(x, *added, **parameters, out_dtype=torch.float32, provider=provider)
        assert isinstance(out, torch.Tensor)
        assert_close(out, h, torch.float32) if dtype == torch.float32 else assert_close(out.to(dtype), h, dtype)
        if dtype == torch.float32:  # a rounded stream moves an e4m3 value by more than its own step
            _, rows = residual_norm(x, *added, **parameters, out_dtype=torch.float8_e4m3fn, provider=provider)
            assert isinstance(rows, Fp8Rows)
            assert_rows_close(rows, h)
            given = torch.tensor([0.5, 2.0], device=device)
            _, whole = residual_norm(
                x, *added, **parameters, out_dtype=torch.float8_e4m3fn, out_scale_B=given, provider=provider
            )
            assert isinstance(whole, Fp8Samples)
            rows = Fp8Rows(whole.values, whole.scale[:, None].expand(2, L))
            assert_rows_close(rows, h, amax=given[:, None] * FP8_MAX)


@pytest.mark.parametrize(("L", "S", "H", "D"), [(70, 1, 3, 64), (9, 32, 2, 128), (580, 61, 3, 64), (150, 130, 2, 64)])
@pytest.mark.parametrize("last_count", [1, 452])
def test_text_attention(
    device: torch.device, dtype: torch.dtype, L: int, S: int, H: int, D: int, last_count: int
) -> None:
    """The weighted key is that many equal keys; what lies behind the text in its memory is not read."""
    q = draw(device, dtype, L, 2 * H * D)[:, : H * D]
    weight = draw(device, torch.float32, H * D, seed=1)
    k, v = (draw(device, dtype, S, H, D, seed=s) for s in (2, 3))
    normed = F.rms_norm(q.double(), (H * D,), weight.double(), 1e-6).view(L, H, D)
    keys, values = (torch.cat((x.double(), x[-1:].double().expand(last_count - 1, -1, -1))) for x in (k, v))
    logits = torch.einsum("lhd,shd->hls", normed, keys) / math.sqrt(D)
    exact = torch.einsum("hls,shd->lhd", logits.softmax(-1), values).flatten(1)
    amax = v.abs().amax().float()
    text = TextRows.of(S, last_count=last_count, device=device)
    longer = [torch.cat((x, torch.full_like(x[:1], torch.nan).expand(200 - S, -1, -1))) for x in (k, v)]
    for provider in ("triton", "reference"):
        out = text_attention(q, weight, k, v, eps=1e-6, text=text, provider=provider)
        most = rows_compiled_for(S) or 200
        recorded = text_attention(q, weight, *longer, eps=1e-6, text=text.allowing(most), provider=provider)
        assert torch.equal(recorded, out)
        assert isinstance(out, torch.Tensor)
        if dtype == torch.float32:
            assert_close(out, exact, dtype)
        else:
            assert float((out.double() - exact).norm() / exact.norm()) <= 1e-2  # as sparse attention: P and q' rounded
        rows = text_attention(q, weight, k, v, eps=1e-6, text=text, value_amax=amax, provider=provider)
        assert isinstance(rows, Fp8Rows)
        if dtype == torch.float32:
            assert_rows_close(rows, exact, amax=amax)
        else:
            assert float((rows.dequantize().double() - exact).norm() / exact.norm()) <= 0.04


def test_fp8_linear_multiplies_what_the_rows_stand_for() -> None:
    x, weight = quantize_fp8_rows(torch.randn(2, 5, 64)), quantize_fp8_rows(torch.randn(32, 64))
    bias = torch.randn(32)
    exact = x.dequantize().double() @ weight.dequantize().double().T + bias.double()
    assert_close(fp8_linear(x, weight, bias, out_dtype=torch.float32, provider="reference"), exact, torch.float32)


def test_error_of_an_fp8_linear() -> None:
    """2.6 % of each operand of normal values, 3.7 % together; an outlier in a token leaves the rest as it was."""
    x, weight = torch.randn(1, 256, 512), torch.randn(256, 512)
    for outlier in (0.0, 300.0):
        x[..., 0] = outlier
        weight[:, 0] = 0.0
        exact = F.linear(x, weight)
        rows = quantize_fp8_rows(x), quantize_fp8_rows(weight)
        out = fp8_linear(*rows, None, out_dtype=torch.float32, provider="reference")
        assert 0.03 < float((out - exact).norm() / exact.norm()) < 0.045


@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_bounds_of_a_feed_forward_hold_and_cost_little(outlier: float) -> None:
    """Never a value beyond e4m3; the error is mostly within 15 % of that of scales by row, even with outliers in the
    modulation (of 600 draws with outliers: median 1.12, 95 % below 1.15, most 1.20)."""
    ratios = [error_of_bounds_over_rows(outlier, seed) for seed in range(25)]
    assert statistics.median(ratios) <= 1.15


def error_of_bounds_over_rows(outlier: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, bias = randn(1, 200, 384), randn(512, 384) / 384**0.5, randn(512) * 0.1
    scale, shift = torch.rand(1, 384, generator=generator) - 0.5, randn(1, 384) * 0.3
    scale[:, :4] = outlier
    h = F.layer_norm(x, (384,)) * (1 + scale) + shift
    exact = F.gelu(h @ weight.T + bias, approximate="tanh")
    h_scale, y_scale = ffn_bounds(scale, shift, weight.norm(dim=1).amax(), bias.abs().amax())
    assert (h.abs() <= h_scale * FP8_MAX).all()
    assert (exact.abs() <= y_scale * FP8_MAX).all()
    whole = quantize_fp8_rows(weight.view(1, -1))
    uniform = Fp8Rows(whole.values.view(weight.shape), whole.scale.repeat(512))
    h8 = Fp8Samples((h / h_scale).to(torch.float8_e4m3fn), h_scale)
    out = fp8_gelu_linear(h8, uniform, bias, y_scale, provider="reference").dequantize()
    rows = fp8_linear(quantize_fp8_rows(h), quantize_fp8_rows(weight), bias, out_dtype=torch.float32)
    by_rows = quantize_fp8_rows(rows, gelu=True).dequantize()
    return float((out - exact).norm() / (by_rows - exact).norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fp8_gelu_product_on_the_gpu() -> None:
    """At the real width, the second sample's scales off the 16-byte grid; bits of a sample alone."""
    device = torch.device("cuda")
    if not multiplies_gelu_fp8(device):
        assert torch.cuda.get_device_capability() != (9, 0)
        return
    x8 = draw(device, torch.float32, 2, 1000, 1536).to(torch.float8_e4m3fn)
    weight = draw(device, torch.float32, 8960, 1536, seed=1).to(torch.float8_e4m3fn)
    bias = draw(device, torch.bfloat16, 8960, seed=2)
    x_scale, y_scale = torch.tensor([0.1, 0.2], device=device), torch.tensor([0.02, 0.05], device=device)
    rows = Fp8Rows(weight, torch.full((8960,), 0.3, device=device))
    out = fp8_gelu_linear(Fp8Samples(x8, x_scale), rows, bias, y_scale)
    exact = F.linear(x8.float() * x_scale[:, None, None], rows.dequantize(), bias.float())
    exact = F.gelu(exact, approximate="tanh")
    assert float((out.dequantize() - exact).norm() / exact.norm()) <= 0.03  # 2.65 % is the rounding of the result
    for i in range(2):
        chosen = slice(i, i + 1)
        alone = fp8_gelu_linear(Fp8Samples(x8[chosen], x_scale[chosen]), rows, bias, y_scale[chosen])
        assert torch.equal(out.values[chosen].view(torch.uint8), alone.values.view(torch.uint8))


def test_a_product_that_cublas_refuses_is_made_of_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused once, known from then on; what is refused for another reason, or with enough rows, is an error."""
    tried = []

    def scaled_mm(x8: torch.Tensor, w8: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        tried.append(len(x8))
        if len(x8) <= 256 or x8.shape[1] == 48:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED" if x8.shape[1] > 32 else "out of order")
        return (x8.float() * arguments["scale_a"]) @ (w8.float() * arguments["scale_b"])

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8_linear_module, "_refused", set())
    x, weight = (quantize_fp8_rows(torch.randn(rows, 64)) for rows in (5, 32))
    for _ in range(2):
        y = fp8_linear_module._multiply(x, weight, None)
        assert_close(y, x.dequantize() @ weight.dequantize().T, torch.float32)
    assert tried == [5, 272, 272]
    for K, says in ((48, "NOT_SUPPORTED"), (32, "out of order")):
        x, weight = (quantize_fp8_rows(torch.randn(rows, K)) for rows in (5, 32))
        with pytest.raises(RuntimeError, match=says):
            fp8_linear_module._multiply(x, weight, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("L", "K", "N"), [(1000, 1536, 1536), (12, 8960, 1536), (1, 13824, 5120), (127, 9216, 3072)])
def test_fp8_product_on_the_gpu(L: int, K: int, N: int) -> None:
    """Sums of cuBLAS's fast accumulation, and the bits of a sample alone."""
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ValueError, match="e4m3"):
            fp8_linear(quantize_fp8_rows(torch.randn(1, 16, 64, device=device)), Fp8Rows(*[torch.empty(0)] * 2), None)
        return
    assert multiplies_fp8(device)
    x = quantize_fp8_rows(draw(device, torch.bfloat16, 2, L, K))
    weight = quantize_fp8_rows(draw(device, torch.bfloat16, N, K, seed=1))
    bias = draw(device, torch.bfloat16, N, seed=2)
    out = fp8_linear(x, weight, bias)
    exact = fp8_linear(x, weight, bias, provider="reference", out_dtype=torch.float32)
    assert float((out.float() - exact).norm() / exact.norm()) <= 5e-3
    for i in range(2):
        alone = fp8_linear(Fp8Rows(x.values[i : i + 1], x.scale[i : i + 1]), weight, bias)
        assert torch.equal(out[i : i + 1], alone)


def test_arguments_that_do_not_fit() -> None:
    x, weight = torch.zeros(1, 4, 64), torch.ones(64)
    with pytest.raises(ValueError, match="gate"):
        residual_norm(x, None, torch.ones(1, 64), eps=1e-6)
    with pytest.raises(ValueError, match="together"):
        residual_norm(x, weight=weight, eps=1e-6)
    with pytest.raises(ValueError, match="y is"):
        residual_norm(x, x[:, :3], eps=1e-6)
    with pytest.raises(ValueError, match="out_dtype"):
        residual_norm(x, eps=1e-6, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="last_count"):
        TextRows.of(2, last_count=0, device=x.device)
    text = TextRows.of(3, device=x.device)
    with pytest.raises(ValueError, match="up to 3 rows"):
        text_attention(x[0], weight, torch.zeros(2, 1, 64), torch.zeros(2, 1, 64), eps=1e-6, text=text)
    with pytest.raises(ValueError, match="head_dim"):
        text_attention(x[0], weight, torch.zeros(2, 2, 32), torch.zeros(2, 2, 32), eps=1e-6)
    with pytest.raises(ValueError, match=r"\[S, H, D\]"):
        text_attention(x[0], weight, torch.zeros(2, 1, 64), torch.zeros(3, 1, 64), eps=1e-6)
    with pytest.raises(ValueError, match="K 2 or more"):
        quantize_fp8_rows(torch.zeros(3, 1))
    rows = quantize_fp8_rows(x)
    with pytest.raises(ValueError, match=r"\[B, L, K\]"):
        fp8_linear(rows, quantize_fp8_rows(torch.zeros(3, 32)), None)
    with pytest.raises(ValueError, match="bias"):
        fp8_linear(rows, quantize_fp8_rows(torch.zeros(3, 64)), torch.zeros(4))
