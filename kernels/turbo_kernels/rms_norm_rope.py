"""RMSNorm over the whole model dimension, split into heads, then rotary embedding, in one pass.

    y          = x / sqrt(mean_D(x^2) + eps) * weight
    (e, o)     = neighbouring channels 2i, 2i+1 of a head
    (e', o')   = (e cos - o sin, e sin + o cos)

All in fp32, rounded once. Source: Wan2.1 (qk norm and 3-D rotary embedding).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.layer_norm import row_warps
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider


def rms_norm_rope(
    x_BLD: torch.Tensor,
    weight_D: torch.Tensor,
    rope: torch.Tensor | None,
    *,
    num_heads: int,
    eps: float,
    provider: str | None = None,
) -> torch.Tensor:
    """Normalise, scale and rotate; returns [B, L, num_heads, D / num_heads] in x's dtype.

    Args:
        x_BLD: [B, L, D], the last dimension contiguous.
        weight_D: [D].
        rope: fp32 [L, head_dim / 2, 2] of (cos, sin), or None for no rotation.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    check_float("x", x_BLD)
    check_float("weight", weight_D)
    if x_BLD.ndim != 3 or 0 in x_BLD.shape:
        raise ValueError(f"x has shape {tuple(x_BLD.shape)}: must be [B, L, D], not empty")
    B, L, D = x_BLD.shape
    if num_heads < 1 or D % num_heads or (D // num_heads) % 2:
        raise ValueError(f"D = {D} does not split into {num_heads} heads of even size")
    head_dim = D // num_heads
    if weight_D.shape != (D,) or weight_D.device != x_BLD.device:
        raise ValueError(f"weight is {tuple(weight_D.shape)} on {weight_D.device}: must be {(D,)} on {x_BLD.device}")
    if rope is not None and (
        rope.shape != (L, head_dim // 2, 2) or rope.dtype != torch.float32 or rope.device != x_BLD.device
    ):
        raise ValueError(
            f"rope is {rope.dtype} {tuple(rope.shape)} on {rope.device}: "
            f"must be torch.float32 {(L, head_dim // 2, 2)} on {x_BLD.device}"
        )
    provider = resolve_provider(provider, x_BLD.device, op="rms_norm_rope")
    if provider == "triton":
        return _rms_norm_rope_triton(x_BLD, weight_D, rope, num_heads, eps)
    x = x_BLD.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()
    y_BLHD = y.view(B, L, num_heads, head_dim)
    if rope is not None:
        even, odd = y_BLHD[..., 0::2], y_BLHD[..., 1::2]
        cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
        y_BLHD = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return y_BLHD.to(x_BLD.dtype)


@triton.jit(do_not_specialize=["L"])
@no_type_check
def rms_norm_rope_kernel(
    x,
    weight,  # [D]
    rope,  # [L, HEAD_DIM / 2, 2]
    y,  # [B, L, D] contiguous
    L,
    D,
    eps,
    stride_xb,
    stride_xl,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    i_l = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, ROW)
    inside = o_d < D
    b_x = tl.load(x + i_b * stride_xb + i_l * stride_xl + o_d, mask=inside, other=0.0).to(tl.float32)
    b_y = b_x * (1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps))
    b_y = b_y * tl.load(weight + o_d, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        even, odd = tl.split(tl.reshape(b_y, [ROW // 2, 2]))
        # (cos, sin) lie in a row of the table as (even, odd) do in a head.
        cos, sin = tl.split(tl.reshape(tl.load(rope + i_l * HEAD_DIM + o_d % HEAD_DIM), [ROW // 2, 2]))
        b_y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROW])
    tl.store(y + (i_b * L + i_l) * D + o_d, b_y.to(y.dtype.element_ty), mask=inside)


def _rms_norm_rope_triton(
    x_BLD: torch.Tensor, weight_D: torch.Tensor, rope: torch.Tensor | None, num_heads: int, eps: float
) -> torch.Tensor:
    B, L, D = x_BLD.shape
    x_BLD = x_BLD if x_BLD.stride(-1) == 1 else x_BLD.contiguous()
    y = torch.empty(B, L, num_heads, D // num_heads, dtype=x_BLD.dtype, device=x_BLD.device)
    row = triton.next_power_of_2(D)
    with device_of(x_BLD):
        rms_norm_rope_kernel[(L, B)](
            x_BLD, weight_D.contiguous(), x_BLD if rope is None else rope.contiguous(), y, L, D, eps,
            *x_BLD.stride()[:2],
            ROW=row, HEAD_DIM=D // num_heads, ROTATE=rope is not None,
            num_warps=row_warps(row), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return y
