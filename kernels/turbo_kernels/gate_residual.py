"""Gated residual: x + y * gate, in fp32, rounded once. Source: Wan2.1 (adaLN gates)."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

_ROWS, _COLUMNS = 16, 256


def gate_residual(
    x_BLD: torch.Tensor, y_BLD: torch.Tensor, gate_BD: torch.Tensor, *, provider: str | None = None
) -> torch.Tensor:
    """Add y, scaled by each sample's gate, to x; returns [B, L, D] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    for name, tensor in (("x", x_BLD), ("y", y_BLD), ("gate", gate_BD)):
        check_float(name, tensor)
        if tensor.device != x_BLD.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x_BLD.device}")
    if x_BLD.ndim != 3 or 0 in x_BLD.shape:
        raise ValueError(f"x has shape {tuple(x_BLD.shape)}: must be [B, L, D], not empty")
    B, _, D = x_BLD.shape
    if y_BLD.shape != x_BLD.shape or gate_BD.shape != (B, D):
        raise ValueError(
            f"y is {tuple(y_BLD.shape)} and gate {tuple(gate_BD.shape)}: must be {tuple(x_BLD.shape)} and {(B, D)}"
        )
    provider = resolve_provider(provider, x_BLD.device, op="gate_residual")
    if provider == "triton":
        return _gate_residual_triton(x_BLD, y_BLD, gate_BD)
    return torch.addcmul(x_BLD.float(), y_BLD.float(), gate_BD.float()[:, None]).to(x_BLD.dtype)


@triton.jit(do_not_specialize=["L"])
@no_type_check
def gate_residual_kernel(
    x,
    y,
    gate,  # [B, D]
    out,  # [B, L, D] contiguous
    L,
    D,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gate,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    o_l = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    inside = (o_l < L)[:, None] & (o_d < D)[None, :]
    b_gate = tl.load(gate + i_b * stride_gate + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_x = tl.load(x + i_b * stride_xb + o_l[:, None] * stride_xl + o_d[None, :], mask=inside, other=0.0).to(tl.float32)
    b_y = tl.load(y + i_b * stride_yb + o_l[:, None] * stride_yl + o_d[None, :], mask=inside, other=0.0).to(tl.float32)
    p_out = out + (i_b * L + o_l)[:, None] * D + o_d[None, :]
    tl.store(p_out, (b_x + b_y * b_gate[None, :]).to(out.dtype.element_ty), mask=inside)


def _gate_residual_triton(x_BLD: torch.Tensor, y_BLD: torch.Tensor, gate_BD: torch.Tensor) -> torch.Tensor:
    B, L, D = x_BLD.shape
    x, y, gate = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_BLD, y_BLD, gate_BD))
    out = torch.empty(B, L, D, dtype=x.dtype, device=x.device)
    with device_of(x):
        gate_residual_kernel[(triton.cdiv(D, _COLUMNS), triton.cdiv(L, _ROWS), B)](
            x, y, gate, out, L, D, *x.stride()[:2], *y.stride()[:2], gate.stride(0),
            ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return out
