"""Linear layer of e4m3 weights and activations (W8A8) with one scale a row of each.

    amax  = max(floor, max|x|) over a row                  a token of the input, an output channel of the weight
    x8    = e4m3(x / scale), scale = amax / 448
    y     = x_scale * w_scale * (x8 w8^T)_fp32 + bias

A token is quantised by itself, so nothing depends on its neighbours or its batch. e4m3 keeps a relative step of 2^-4
to 2^-3 over fifteen binades: each operand of normal values carries an error of 2.6 %, a product of many terms 3.7 %,
where int8 by 128 x 128 blocks carries 1.4 % of such values but loses what is small beside an outlier.
The product is PyTorch's `_scaled_mm` (cuBLASLt or CUTLASS); quantising, alone or behind GELU, is a triton-lang kernel.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.providers import FUSE_FMA, device_of, has_fp8, resolve_provider

_log = logging.getLogger(__name__)

#: Largest e4m3 value.
FP8_MAX = 448.0
AMAX_FLOOR = 1e-12
#: cuBLAS refuses some products of up to 256 rows with a scale each (https://github.com/pytorch/ao/issues/4582).
_ENOUGH_ROWS = 272
#: Products that it has refused: L, K, N, whether without bias, device.
_refused: set[tuple[int, int, int, bool, torch.device]] = set()


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows of e4m3 values, each with its scale.

    Attributes:
        values: e4m3 [..., K].
        scale: fp32 [...]; a row is values * scale.
    """

    values: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """fp32 [..., K]."""
        return self.values.float() * self.scale[..., None]


def quantize_fp8_rows(x: torch.Tensor, *, gelu: bool = False, provider: str | None = None) -> Fp8Rows:
    """Quantise each row of x, or of GELU(x) in its tanh form.

    Args:
        x: [..., K] of fp32, fp16 or bf16.

    Raises:
        ValueError: inputs or provider that do not fit.
    """
    check_float("x", x)
    if x.ndim < 1 or 0 in x.shape or x.shape[-1] < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be [..., K], K 2 or more, not empty")
    if resolve_provider(provider, x.device, op="quantize_fp8_rows") == "triton":
        return _quantize_triton(x, gelu)
    x = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = x.abs().amax(-1).clamp_min(AMAX_FLOOR) * (1.0 / FP8_MAX)
    return Fp8Rows((x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


def fp8_linear(
    x: Fp8Rows,
    weight: Fp8Rows,
    bias_N: torch.Tensor | None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    provider: str | None = None,
) -> torch.Tensor:
    """x w^T + bias; returns [B, L, N] in `out_dtype`. Samples are multiplied one at a time: cuBLAS picks by shape.

    Args:
        x: values [B, L, K], scale [B, L].
        weight: values [N, K], scale [N]; N and K multiples of 16 where a GPU multiplies.
        bias_N: [N] or None.
        provider: `reference` multiplies what the rows stand for in fp32; `triton` is the GPU's 8-bit product, in
            bfloat16 alone (under the interpreter, the former).

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    if x.values.ndim != 3 or weight.values.ndim != 2 or x.values.shape[-1] != weight.values.shape[-1]:
        raise ValueError(
            f"x is {tuple(x.values.shape)}, weight {tuple(weight.values.shape)}: must be [B, L, K], [N, K]"
        )
    N = weight.values.shape[0]
    if bias_N is not None and (bias_N.shape != (N,) or not bias_N.is_floating_point()):
        raise ValueError(f"bias is {bias_N.dtype} {tuple(bias_N.shape)}: must be floating-point {(N,)}")
    device = x.values.device
    provider = resolve_provider(provider, device, op="fp8_linear")
    if provider == "reference" or device.type != "cuda":  # no kernel of ours: nothing to interpret
        bias = None if bias_N is None else bias_N.float()
        dense = weight.dequantize()
        return torch.stack([F.linear(sample, dense, bias) for sample in x.dequantize()]).to(out_dtype)
    if not has_fp8(device):
        raise ValueError(f"{device} does not multiply e4m3: it takes compute capability 8.9 or later")
    if out_dtype != torch.bfloat16 or (bias_N is not None and bias_N.dtype != torch.bfloat16):
        raise ValueError(f"out_dtype is {out_dtype}: 8-bit products are rounded to bfloat16, and so is their bias")
    samples = [
        _multiply(Fp8Rows(values, scale), weight, bias_N) for values, scale in zip(x.values, x.scale, strict=True)
    ]
    return samples[0][None] if len(samples) == 1 else torch.stack(samples)


def _multiply(x: Fp8Rows, weight: Fp8Rows, bias_N: torch.Tensor | None) -> torch.Tensor:
    """bf16 [L, N] of one sample, by cuBLAS; where it refuses few rows of great depth, with rows of zeros behind."""
    L, K = x.values.shape
    product = (L, K, len(weight.values), bias_N is None, x.values.device)
    if product in _refused:
        num_zeros = _ENOUGH_ROWS - L
        zeros = x.values.new_zeros(num_zeros, K)
        x = Fp8Rows(
            torch.cat((x.values.view(torch.uint8), zeros.view(torch.uint8))).view(x.values.dtype),
            F.pad(x.scale, (0, num_zeros)),
        )
    try:
        y = torch._scaled_mm(
            x.values,
            weight.values.t(),
            scale_a=x.scale[:, None],
            scale_b=weight.scale[None],
            bias=bias_N,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    except RuntimeError as error:
        if len(x.values) >= _ENOUGH_ROWS or "NOT_SUPPORTED" not in str(error):
            raise
        _refused.add(product)
        return _multiply(x, weight, bias_N)
    return y[:L]


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether `fp8_linear` runs on this GPU: it has the units, and the cuBLAS of this PyTorch offers the product.

    Some releases refuse scales by row on consumer Blackwell, so a small product is tried and compared.
    """
    if not has_fp8(device):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        quantize_fp8_rows(torch.randn(*shape, generator=generator).to(device)) for shape in ((1, 256, 256), (128, 256))
    )
    try:
        out = fp8_linear(x, weight, None)
    except RuntimeError as error:
        _log.warning("%s does not multiply e4m3 by rows: %s", device, error)
        return False
    expected = fp8_linear(x, weight, None, provider="reference")
    return bool((out - expected).float().norm() <= 0.01 * expected.float().norm())


@triton.jit
@no_type_check
def gelu_tanh(b_x):
    """0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3), in fp32."""
    b_u = b_x * (-2.302208198 - 0.1029432397 * b_x * b_x)  # -2 log2(e) u
    return b_x / (1.0 + tl.exp2(tl.minimum(b_u, 126.0)))


@triton.jit
@no_type_check
def quantize_fp8_rows_kernel(
    x,
    x8,  # [M, K] contiguous
    scales,  # [M]
    K,
    amax_floor,
    fp8_max,
    stride_m,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    GELU: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, TAIL)
    inside = o_1 < K
    b_0 = tl.load(x + i_m * stride_m + o_0).to(tl.float32)
    b_1 = tl.load(x + i_m * stride_m + o_1, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        b_0 = gelu_tanh(b_0)
        b_1 = gelu_tanh(b_1)
    amax = tl.maximum(tl.max(tl.abs(b_0), 0), tl.max(tl.abs(b_1), 0))
    scale = tl.maximum(amax, amax_floor) * (1.0 / fp8_max)
    inverse = 1.0 / scale
    # The inverse is rounded: the largest value may land a hair above what e4m3 holds, and would become NaN.
    b_0 = tl.minimum(tl.maximum(b_0 * inverse, -fp8_max), fp8_max)
    b_1 = tl.minimum(tl.maximum(b_1 * inverse, -fp8_max), fp8_max)
    tl.store(x8 + i_m * K + o_0, b_0.to(x8.dtype.element_ty))
    tl.store(x8 + i_m * K + o_1, b_1.to(x8.dtype.element_ty), mask=inside)
    tl.store(scales + i_m, scale)


def row_pieces(size: int) -> tuple[int, int]:
    """A row as two powers of two, (head, tail): head < size <= head + tail, so that few lanes idle.

    1536 = 1024 + 512, 5120 = 4096 + 1024, 8960 = 8192 + 768 of 1024.
    """
    head = triton.next_power_of_2(size) // 2
    return head, triton.next_power_of_2(size - head)


def piece_warps(head: int) -> int:
    """Warps of a program that holds one row: 16 values of the head a thread."""
    return min(max(head // 512, 1), 16)


def _quantize_triton(x: torch.Tensor, gelu: bool) -> Fp8Rows:
    K = x.shape[-1]
    x_MK = x.reshape(-1, K)
    x_MK = x_MK if x_MK.stride(-1) == 1 else x_MK.contiguous()
    M = x_MK.shape[0]
    x8 = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    head, tail = row_pieces(K)
    with device_of(x):
        quantize_fp8_rows_kernel[(M,)](
            x_MK, x8, scale, K, AMAX_FLOOR, FP8_MAX, x_MK.stride(0),
            HEAD=head, TAIL=tail, GELU=gelu, num_warps=piece_warps(head), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return Fp8Rows(x8, scale)
