"""Gated residual, the LayerNorm behind it, its modulation, and 8-bit rounding for the next product: one pass.

    x'  = x + y [* gate]                                          rounded to the dtype of x
    h   = LN(x') [* weight + bias] [* (1 + scale) + shift]        LN in fp32 with the true variance over D
    out = h, or e4m3 of h with one scale a token, or with one given scale a sample

Source: Wan2.1 (adaLN blocks); the fusion is that of any memory-bound chain: each tensor is read and written once.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.fp8_gelu_linear import Fp8Samples
from turbo_kernels.fp8_linear import AMAX_FLOOR, FP8_MAX, Fp8Rows, quantize_fp8_rows, row_pieces
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

#: Values of the heads of its rows that a program takes: enough bytes in flight on a multiprocessor.
_VALUES = 4096


def residual_norm(
    x_BLD: torch.Tensor,
    y_BLD: torch.Tensor | None = None,
    gate_BD: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale_BD: torch.Tensor | None = None,
    shift_BD: torch.Tensor | None = None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    out_scale_B: torch.Tensor | None = None,
    provider: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Fp8Rows | Fp8Samples]:
    """Add a branch's output to the residual stream and prepare the next branch's input.

    Args:
        x_BLD: the residual stream.
        y_BLD: what is added to it; None adds nothing.
        gate_BD: factor of y by sample; None is one.
        weight, bias: [D], both or neither.
        scale_BD, shift_BD: [B, D], both or neither.
        out_dtype: of h: that of x (None), torch.float32, or torch.float8_e4m3fn for `Fp8Rows`.
        out_scale_B: fp32 [B], with e4m3 alone: h is divided by its sample's and comes as `Fp8Samples`.

    Returns:
        x', in the dtype of x (x itself where nothing is added), and h.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    check_float("x", x_BLD)
    if x_BLD.ndim != 3 or 0 in x_BLD.shape or x_BLD.shape[-1] < 2:
        raise ValueError(f"x has shape {tuple(x_BLD.shape)}: must be [B, L, D], D 2 or more, not empty")
    B, _, D = x_BLD.shape
    out_dtype = out_dtype or x_BLD.dtype
    if out_dtype not in (x_BLD.dtype, torch.float32, torch.float8_e4m3fn):
        raise ValueError(f"out_dtype is {out_dtype}: must be {x_BLD.dtype}, float32 or float8_e4m3fn")
    if (weight is None) != (bias is None) or (scale_BD is None) != (shift_BD is None):
        raise ValueError("weight and bias, and scale and shift, must be given together or not at all")
    if out_scale_B is not None and (
        out_dtype != torch.float8_e4m3fn or out_scale_B.shape != (B,) or out_scale_B.dtype != torch.float32
    ):
        found = f"{out_scale_B.dtype} {tuple(out_scale_B.shape)} for {out_dtype}"
        raise ValueError(f"out_scale is {found}: must be torch.float32 {(B,)} for float8_e4m3fn")
    if gate_BD is not None and y_BLD is None:
        raise ValueError("a gate needs a y to act on")
    for name, tensor, shape in (
        ("y", y_BLD, tuple(x_BLD.shape)),
        ("gate", gate_BD, (B, D)),
        ("weight", weight, (D,)),
        ("bias", bias, (D,)),
        ("scale", scale_BD, (B, D)),
        ("shift", shift_BD, (B, D)),
    ):
        if tensor is not None:
            check_float(name, tensor)
            if tuple(tensor.shape) != shape or tensor.device != x_BLD.device:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be {shape} on {x_BLD.device}"
                )
    provider = resolve_provider(provider, x_BLD.device, op="residual_norm")
    if provider == "triton":
        x_BLD, h, h_scale = _residual_norm_triton(
            x_BLD, y_BLD, gate_BD, weight, bias, scale_BD, shift_BD, eps, out_dtype, out_scale_B
        )
        if h_scale is None:
            return x_BLD, h
        return x_BLD, Fp8Rows(h, h_scale) if out_scale_B is None else Fp8Samples(h, h_scale)
    if y_BLD is not None:
        x_BLD = x_BLD + y_BLD if gate_BD is None else gate_residual(x_BLD, y_BLD, gate_BD)
    x = x_BLD if out_dtype == x_BLD.dtype else x_BLD.float()
    h = layer_norm_modulate(x, weight=weight, bias=bias, scale_BD=scale_BD, shift_BD=shift_BD, eps=eps)
    if out_dtype != torch.float8_e4m3fn:
        return x_BLD, h
    if out_scale_B is None:
        return x_BLD, quantize_fp8_rows(h, provider=provider)
    scaled = (h / out_scale_B[:, None, None]).clamp(-FP8_MAX, FP8_MAX)
    return x_BLD, Fp8Samples(scaled.to(torch.float8_e4m3fn), out_scale_B)


def gate_residual(x_BLD: torch.Tensor, y_BLD: torch.Tensor, gate_BD: torch.Tensor) -> torch.Tensor:
    """x' by PyTorch, with a gate."""
    return torch.addcmul(x_BLD.float(), y_BLD.float(), gate_BD.float()[:, None]).to(x_BLD.dtype)


def layer_norm_modulate(
    x_BLD: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale_BD: torch.Tensor | None = None,
    shift_BD: torch.Tensor | None = None,
    eps: float,
) -> torch.Tensor:
    """h by PyTorch, in the dtype of x."""
    weight, bias = (None if part is None else part.float() for part in (weight, bias))
    h = F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], weight, bias, eps)
    if scale_BD is not None and shift_BD is not None:
        h = h * (1.0 + scale_BD.float()[:, None]) + shift_BD.float()[:, None]
    return h.to(x_BLD.dtype)


@triton.jit
@no_type_check
def _add_branch(p_x, p_y, p_out, p_gate, mask, inside, RESIDUAL: tl.constexpr, GATE: tl.constexpr):
    """x', as its dtype rounds it, in fp32; stored where something was added."""
    b_x = tl.load(p_x, mask=mask, other=0.0)
    if RESIDUAL:
        b_y = tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            b_y = b_y * tl.load(p_gate, mask=inside, other=0.0).to(tl.float32)[None, :]
        b_x = (b_x.to(tl.float32) + b_y).to(p_out.dtype.element_ty)
        tl.store(p_out, b_x, mask=mask)
    return b_x.to(tl.float32)


@triton.jit
@no_type_check
def _modulate(b_x, weight, bias, scale, shift, o_d, inside, AFFINE: tl.constexpr, MODULATE: tl.constexpr):
    """x * factor + offset, which weight, bias, scale and shift make together."""
    b_factor = tl.full(o_d.shape, 1.0, dtype=tl.float32)
    b_offset = tl.zeros(o_d.shape, dtype=tl.float32)
    if AFFINE:
        b_factor = tl.load(weight + o_d, mask=inside, other=0.0).to(tl.float32)
        b_offset = tl.load(bias + o_d, mask=inside, other=0.0).to(tl.float32)
    if MODULATE:
        b_scale = 1.0 + tl.load(scale + o_d, mask=inside, other=0.0).to(tl.float32)
        b_factor = b_factor * b_scale
        b_offset = b_offset * b_scale + tl.load(shift + o_d, mask=inside, other=0.0).to(tl.float32)
    return b_x * b_factor[None, :] + b_offset[None, :]


@triton.jit(do_not_specialize=["L"])
@no_type_check
def residual_norm_kernel(
    x,
    y,  # RESIDUAL only
    gate,  # [B, D], GATE only
    weight,  # [D], AFFINE only
    bias,  # [D], AFFINE only
    scale,  # [B, D], MODULATE only
    shift,  # [B, D], MODULATE only
    x_out,  # [B, L, D] contiguous, RESIDUAL only
    h,  # [B, L, D] contiguous
    h_scale,  # QUANTIZE only: [B, L], written; or [B], read where GIVEN
    L,
    D,
    eps,
    amax_floor,
    fp8_max,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gate,
    stride_scale,
    stride_shift,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    AFFINE: tl.constexpr,
    MODULATE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    # Whole rows at once: enough loads in flight to hide their latency. Factors are fetched where they are used, since
    # they come from the L1 cache and would take registers that other programs need.
    i_b = tl.program_id(1).to(tl.int64)
    o_l = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, TAIL)
    in_l = o_l < L
    in_0 = o_0 < HEAD
    in_1 = o_1 < D
    mask_0 = in_l[:, None] & in_0[None, :]
    mask_1 = in_l[:, None] & in_1[None, :]
    scale += i_b * stride_scale
    shift += i_b * stride_shift
    gate += i_b * stride_gate
    p_x = x + i_b * stride_xb + o_l[:, None] * stride_xl
    p_y = y + i_b * stride_yb + o_l[:, None] * stride_yl
    at_0 = (i_b * L + o_l)[:, None] * D + o_0[None, :]
    at_1 = (i_b * L + o_l)[:, None] * D + o_1[None, :]
    b_0 = _add_branch(p_x + o_0[None, :], p_y + o_0[None, :], x_out + at_0, gate + o_0, mask_0, in_0, RESIDUAL, GATE)
    b_1 = _add_branch(p_x + o_1[None, :], p_y + o_1[None, :], x_out + at_1, gate + o_1, mask_1, in_1, RESIDUAL, GATE)
    mean = (tl.sum(b_0, 1) + tl.sum(b_1, 1)) / D
    b_0 = b_0 - mean[:, None]
    b_1 = tl.where(in_1[None, :], b_1 - mean[:, None], 0.0)  # padded lanes must stay out of the variance
    rstd = 1.0 / tl.sqrt((tl.sum(b_0 * b_0, 1) + tl.sum(b_1 * b_1, 1)) / D + eps)
    b_0 = _modulate(b_0 * rstd[:, None], weight, bias, scale, shift, o_0, in_0, AFFINE, MODULATE)
    b_1 = _modulate(b_1 * rstd[:, None], weight, bias, scale, shift, o_1, in_1, AFFINE, MODULATE)
    if QUANTIZE:
        if GIVEN:
            row_scale = tl.load(h_scale + i_b + tl.zeros([ROWS], dtype=tl.int32))
        else:
            amax = tl.maximum(tl.max(tl.abs(b_0), 1), tl.max(tl.abs(b_1), 1))
            row_scale = tl.maximum(amax, amax_floor) * (1.0 / fp8_max)
            tl.store(h_scale + i_b * L + o_l, row_scale, mask=in_l)
        inverse = (1.0 / row_scale)[:, None]
        b_0 = tl.minimum(tl.maximum(b_0 * inverse, -fp8_max), fp8_max)
        b_1 = tl.minimum(tl.maximum(b_1 * inverse, -fp8_max), fp8_max)
    tl.store(h + at_0, b_0.to(h.dtype.element_ty), mask=mask_0)
    tl.store(h + at_1, b_1.to(h.dtype.element_ty), mask=mask_1)


def _residual_norm_triton(
    x_BLD: torch.Tensor,
    y_BLD: torch.Tensor | None,
    gate_BD: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale_BD: torch.Tensor | None,
    shift_BD: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    out_scale_B: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x', h, and the scale of h where it is e4m3."""
    B, L, D = x_BLD.shape
    x = _rows(x_BLD)
    y, gate, scale, shift = (x if t is None else _rows(t) for t in (y_BLD, gate_BD, scale_BD, shift_BD))
    affine = (x, x) if weight is None or bias is None else (weight.contiguous(), bias.contiguous())
    x_out = x if y_BLD is None else torch.empty(B, L, D, dtype=x.dtype, device=x.device)
    h = torch.empty(B, L, D, dtype=out_dtype, device=x.device)
    quantize = out_dtype == torch.float8_e4m3fn
    h_scale = x if out_scale_B is None else out_scale_B.contiguous()
    if quantize and out_scale_B is None:
        h_scale = torch.empty(B, L, dtype=torch.float32, device=x.device)
    head, tail = row_pieces(D)
    rows = max(_VALUES // head, 1)
    with device_of(x):
        residual_norm_kernel[(triton.cdiv(L, rows), B)](
            x, y, gate, *affine, scale, shift, x_out, h, h_scale, L, D, eps, AMAX_FLOOR, FP8_MAX,
            *x.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0), shift.stride(0),
            HEAD=head, TAIL=tail, ROWS=rows, RESIDUAL=y_BLD is not None, GATE=gate_BD is not None,
            AFFINE=weight is not None, MODULATE=scale_BD is not None, QUANTIZE=quantize, GIVEN=out_scale_B is not None,
            num_warps=8 if rows == 1 else 4, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return x_BLD if y_BLD is None else x_out, h, h_scale if quantize else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
