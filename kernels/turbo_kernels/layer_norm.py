"""LayerNorm and the modulation behind it in one pass.

    y = ((x - mean) / sqrt(var + eps) [* weight + bias]) [* (1 + scale) + shift]

All in fp32 with the true biased variance over D (upstream's fast kernel adds padded lanes to it), rounded once.
Source: Wan2.1 (norms and adaLN modulation).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider


def layer_norm_modulate(
    x_BLD: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale_BD: torch.Tensor | None = None,
    shift_BD: torch.Tensor | None = None,
    eps: float,
    provider: str | None = None,
) -> torch.Tensor:
    """LayerNorm over D, optional affine, optional modulation by sample; returns [B, L, D] in x's dtype.

    Args:
        weight, bias: [D], both or neither.
        scale_BD, shift_BD: [B, D], both or neither.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    check_float("x", x_BLD)
    if x_BLD.ndim != 3 or 0 in x_BLD.shape:
        raise ValueError(f"x has shape {tuple(x_BLD.shape)}: must be [B, L, D], not empty")
    B, _, D = x_BLD.shape
    if (weight is None) != (bias is None) or (scale_BD is None) != (shift_BD is None):
        raise ValueError("weight and bias, and scale and shift, must be given together or not at all")
    for name, parameter, shape in (
        ("weight", weight, (D,)),
        ("bias", bias, (D,)),
        ("scale", scale_BD, (B, D)),
        ("shift", shift_BD, (B, D)),
    ):
        if parameter is not None:
            check_float(name, parameter)
            if parameter.shape != shape or parameter.device != x_BLD.device:
                raise ValueError(
                    f"{name} is {tuple(parameter.shape)} on {parameter.device}: must be {shape} on {x_BLD.device}"
                )
    provider = resolve_provider(provider, x_BLD.device, op="layer_norm_modulate")
    if provider == "triton":
        return _layer_norm_triton(x_BLD, weight, bias, scale_BD, shift_BD, eps)
    y = F.layer_norm(
        x_BLD.float(), (D,), None if weight is None else weight.float(), None if bias is None else bias.float(), eps
    )
    if scale_BD is not None and shift_BD is not None:
        y = y * (1.0 + scale_BD.float()[:, None]) + shift_BD.float()[:, None]
    return y.to(x_BLD.dtype)


@triton.jit(do_not_specialize=["L"])
@no_type_check
def layer_norm_kernel(
    x,
    weight,  # [D]
    bias,  # [D]
    scale,  # [B, D]
    shift,  # [B, D]
    y,  # [B, L, D] contiguous
    L,
    D,
    eps,
    stride_xb,
    stride_xl,
    stride_scale,
    stride_shift,
    ROW: tl.constexpr,
    AFFINE: tl.constexpr,
    MODULATE: tl.constexpr,
):
    i_l = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, ROW)
    inside = o_d < D
    b_x = tl.load(x + i_b * stride_xb + i_l * stride_xl + o_d, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(b_x, 0) / D
    # Padded lanes must stay out of the variance.
    b_x = tl.where(inside, b_x - mean, 0.0)
    b_y = b_x * (1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps))
    if AFFINE:
        b_y = b_y * tl.load(weight + o_d, mask=inside, other=0.0).to(tl.float32)
        b_y += tl.load(bias + o_d, mask=inside, other=0.0).to(tl.float32)
    if MODULATE:
        b_y = b_y * (1.0 + tl.load(scale + i_b * stride_scale + o_d, mask=inside, other=0.0).to(tl.float32))
        b_y += tl.load(shift + i_b * stride_shift + o_d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + (i_b * L + i_l) * D + o_d, b_y.to(y.dtype.element_ty), mask=inside)


def row_warps(row: int) -> int:
    """Warps for a program that holds one row: 16 to 32 values a thread."""
    return min(max(row // 512, 1), 16)


def _layer_norm_triton(
    x_BLD: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale_BD: torch.Tensor | None,
    shift_BD: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    B, L, D = x_BLD.shape
    x_BLD = x_BLD if x_BLD.stride(-1) == 1 else x_BLD.contiguous()
    scale_BD = None if scale_BD is None else (scale_BD if scale_BD.stride(-1) == 1 else scale_BD.contiguous())
    shift_BD = None if shift_BD is None else (shift_BD if shift_BD.stride(-1) == 1 else shift_BD.contiguous())
    y = torch.empty(B, L, D, dtype=x_BLD.dtype, device=x_BLD.device)
    row = triton.next_power_of_2(D)
    with device_of(x_BLD):
        layer_norm_kernel[(L, B)](
            x_BLD,
            x_BLD if weight is None else weight.contiguous(),
            x_BLD if bias is None else bias.contiguous(),
            x_BLD if scale_BD is None else scale_BD,
            x_BLD if shift_BD is None else shift_BD,
            y, L, D, eps, *x_BLD.stride()[:2],
            0 if scale_BD is None else scale_BD.stride(0), 0 if shift_BD is None else shift_BD.stride(0),
            ROW=row, AFFINE=weight is not None, MODULATE=scale_BD is not None,
            num_warps=row_warps(row), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return y
