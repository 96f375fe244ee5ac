"""RMS norm over channels and SiLU in one pass.

    y = silu(x / max(|x|_C, 1e-12) * sqrt(C) * gamma)

All in fp32, rounded once. Source: Wan2.1 VAE.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

#: Lower bound of the norm that is divided by (Wan2.1).
SMALLEST_NORM = 1e-12


def norm_silu(
    x: torch.Tensor, gamma_C: torch.Tensor, *, out: torch.Tensor | None = None, provider: str | None = None
) -> torch.Tensor:
    """silu(rms_norm(x)) over the last dimension.

    Args:
        x: [..., C] contiguous.
        gamma_C: [C].
        out: where to write, contiguous, of x's shape and dtype; a new tensor by default. May be x itself.

    Raises:
        ValueError: shapes, dtypes, devices or provider that do not fit.
    """
    check_float("x", x)
    check_float("gamma", gamma_C)
    if x.ndim == 0 or 0 in x.shape or gamma_C.shape != x.shape[-1:] or gamma_C.device != x.device:
        raise ValueError(
            f"x is {tuple(x.shape)} on {x.device}, gamma {tuple(gamma_C.shape)} on {gamma_C.device}: "
            "must be [..., C], not empty, and [C]"
        )
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}: must be contiguous and like x")
    provider = resolve_provider(provider, x.device, op="norm_silu")
    if provider == "triton":
        return _norm_silu_triton(x.contiguous(), gamma_C, out)
    return out.copy_(norm_silu_reference(x, gamma_C))


def norm_silu_reference(x: torch.Tensor, gamma_C: torch.Tensor) -> torch.Tensor:
    """The formula in fp32; returns fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(SMALLEST_NORM)
    return F.silu(x.float() / norm * (gamma_C.float() * math.sqrt(x.shape[-1])))


@triton.jit
@no_type_check
def silu_of_norm(b_x, squares, b_gamma, C):
    """silu(x / max(|x|, 1e-12) * sqrt(C) * gamma) of rows [M, N] of fp32 whose squares sum to `squares` [M]."""
    scale = tl.sqrt(C.to(tl.float32)) / tl.maximum(tl.sqrt(squares), 1e-12)
    b_y = b_x * scale[:, None] * b_gamma[None, :]
    return b_y / (1.0 + tl.exp(-b_y))


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check
def norm_silu_kernel(x, gamma, out, num_rows, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, COLUMNS)
    at = o_m[:, None] * C + o_c[None, :]
    mask = (o_m < num_rows)[:, None] & (o_c < C)[None, :]
    b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b_gamma = tl.load(gamma + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_y = silu_of_norm(b_x, tl.sum(b_x * b_x, 1), b_gamma, C)
    tl.store(out + at, b_y.to(out.dtype.element_ty), mask=mask)


def _norm_silu_triton(x: torch.Tensor, gamma_C: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    C = x.shape[-1]
    num_rows = x.numel() // C
    columns = triton.next_power_of_2(C)
    rows = max(1, 4096 // columns)
    with device_of(x):
        norm_silu_kernel[(triton.cdiv(num_rows, rows),)](
            x, gamma_C.contiguous(), out, num_rows, C,
            ROWS=rows, COLUMNS=columns, num_warps=4, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return out
