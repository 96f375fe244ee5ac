"""Residual, the RMSNorm behind it, and 8-bit rounding for the next product: one pass.

    x'  = x + y                                    rounded to the dtype of x
    h   = x' / sqrt(mean_D(x'^2) + eps) * weight   in fp32
    out = h, or e4m3 of h with one scale a token

Source: T5 and UMT5 (pre-norm blocks).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.fp8_linear import AMAX_FLOOR, FP8_MAX, Fp8Rows, piece_warps, quantize_fp8_rows, row_pieces
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider


def residual_rms_norm(
    x_LD: torch.Tensor,
    y_LD: torch.Tensor | None,
    weight_D: torch.Tensor,
    *,
    eps: float,
    quantize: bool = False,
    provider: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Fp8Rows]:
    """Add a branch's output to the residual stream and prepare the next branch's input.

    Args:
        x_LD: the residual stream, D 2 or more.
        y_LD: what is added to it; None adds nothing.
        weight_D: of the norm.
        quantize: give h as `Fp8Rows`.

    Returns:
        x' in the dtype of x (x itself where nothing is added), and h in the dtype of x or as e4m3 rows.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    check_float("x", x_LD)
    if x_LD.ndim != 2 or 0 in x_LD.shape or x_LD.shape[1] < 2:
        raise ValueError(f"x has shape {tuple(x_LD.shape)}: must be [L, D], D 2 or more, not empty")
    for name, tensor, shape in (("y", y_LD, tuple(x_LD.shape)), ("weight", weight_D, (x_LD.shape[1],))):
        if tensor is not None:
            check_float(name, tensor)
            if tuple(tensor.shape) != shape or tensor.device != x_LD.device:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be {shape} on {x_LD.device}"
                )
    provider = resolve_provider(provider, x_LD.device, op="residual_rms_norm")
    if provider == "triton":
        return _residual_rms_norm_triton(x_LD, y_LD, weight_D, eps, quantize)
    if y_LD is not None:
        x_LD = (x_LD.float() + y_LD.float()).to(x_LD.dtype)
    x = x_LD.float()
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()
    return x_LD, quantize_fp8_rows(h, provider=provider) if quantize else h.to(x_LD.dtype)


@triton.jit
@no_type_check
def _add(p_x, p_y, p_out, inside, RESIDUAL: tl.constexpr):
    """x', as its dtype rounds it, in fp32; stored where something was added."""
    b_x = tl.load(p_x, mask=inside, other=0.0)
    if RESIDUAL:
        b_x = (b_x.to(tl.float32) + tl.load(p_y, mask=inside, other=0.0).to(tl.float32)).to(p_out.dtype.element_ty)
        tl.store(p_out, b_x, mask=inside)
    return b_x.to(tl.float32)


@triton.jit
@no_type_check
def residual_rms_norm_kernel(
    x,
    y,  # RESIDUAL only
    weight,  # [D]
    x_out,  # [L, D] contiguous, RESIDUAL only
    h,  # [L, D] contiguous
    h_scale,  # [L], QUANTIZE only
    D,
    eps,
    amax_floor,
    fp8_max,
    stride_x,
    stride_y,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    i_l = tl.program_id(0).to(tl.int64)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, TAIL)
    in_0 = o_0 < HEAD
    in_1 = o_1 < D
    p_x, p_y, p_out = x + i_l * stride_x, y + i_l * stride_y, x_out + i_l * D
    b_0 = _add(p_x + o_0, p_y + o_0, p_out + o_0, in_0, RESIDUAL)
    b_1 = _add(p_x + o_1, p_y + o_1, p_out + o_1, in_1, RESIDUAL)
    rstd = 1.0 / tl.sqrt((tl.sum(b_0 * b_0, 0) + tl.sum(b_1 * b_1, 0)) / D + eps)
    b_0 = b_0 * rstd * tl.load(weight + o_0).to(tl.float32)
    b_1 = b_1 * rstd * tl.load(weight + o_1, mask=in_1, other=0.0).to(tl.float32)
    if QUANTIZE:
        amax = tl.maximum(tl.max(tl.abs(b_0), 0), tl.max(tl.abs(b_1), 0))
        row_scale = tl.maximum(amax, amax_floor) * (1.0 / fp8_max)
        tl.store(h_scale + i_l, row_scale)
        inverse = 1.0 / row_scale
        b_0 = tl.minimum(tl.maximum(b_0 * inverse, -fp8_max), fp8_max)
        b_1 = tl.minimum(tl.maximum(b_1 * inverse, -fp8_max), fp8_max)
    tl.store(h + i_l * D + o_0, b_0.to(h.dtype.element_ty))
    tl.store(h + i_l * D + o_1, b_1.to(h.dtype.element_ty), mask=in_1)


def _residual_rms_norm_triton(
    x_LD: torch.Tensor, y_LD: torch.Tensor | None, weight_D: torch.Tensor, eps: float, quantize: bool
) -> tuple[torch.Tensor, torch.Tensor | Fp8Rows]:
    L, D = x_LD.shape
    x = x_LD if x_LD.stride(-1) == 1 else x_LD.contiguous()
    y = x if y_LD is None else y_LD if y_LD.stride(-1) == 1 else y_LD.contiguous()
    x_out = x if y_LD is None else torch.empty(L, D, dtype=x.dtype, device=x.device)
    h = torch.empty(L, D, dtype=torch.float8_e4m3fn if quantize else x.dtype, device=x.device)
    h_scale = torch.empty(L, dtype=torch.float32, device=x.device) if quantize else x
    head, tail = row_pieces(D)
    with device_of(x):
        residual_rms_norm_kernel[(L,)](
            x, y, weight_D.contiguous(), x_out, h, h_scale, D, eps, AMAX_FLOOR, FP8_MAX, x.stride(0), y.stride(0),
            HEAD=head, TAIL=tail, RESIDUAL=y_LD is not None, QUANTIZE=quantize,
            num_warps=piece_warps(head), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return x_LD if y_LD is None else x_out, Fp8Rows(h, h_scale) if quantize else h
