"""RMSNorm over the whole model dimension and rotary embedding of queries and keys in one launch.

The formula is that of `rms_norm_rope`; both inputs may be slices of one joint projection, read through their strides.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.fp8_linear import piece_warps, row_pieces
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider
from turbo_kernels.rms_norm_rope import rms_norm_rope

#: Tokens a program takes one after another.
_ROWS = 4


def qk_norm_rope(
    q_BLD: torch.Tensor,
    k_BLD: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    rope: torch.Tensor,
    *,
    num_heads: int,
    eps: float,
    provider: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise, scale and rotate; returns q and k as contiguous [B, L, num_heads, D / num_heads] in their dtype.

    Args:
        q_BLD, k_BLD: of one shape, dtype and strides, the last dimension contiguous.
        q_weight_D, k_weight_D: [D], of one dtype.
        rope: fp32 [L, head_dim / 2, 2] of (cos, sin).

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    if resolve_provider(provider, q_BLD.device, op="qk_norm_rope") == "reference":
        return (
            rms_norm_rope(q_BLD, q_weight_D, rope, num_heads=num_heads, eps=eps, provider="reference"),
            rms_norm_rope(k_BLD, k_weight_D, rope, num_heads=num_heads, eps=eps, provider="reference"),
        )
    check_projections(q_BLD, k_BLD, q_weight_D, k_weight_D, rope, num_heads)
    B, L, D = q_BLD.shape
    head_dim = D // num_heads
    q_out, k_out = (torch.empty(B, L, num_heads, head_dim, dtype=q_BLD.dtype, device=q_BLD.device) for _ in range(2))
    head, tail = row_pieces(D)
    with device_of(q_BLD):
        qk_norm_rope_kernel[(triton.cdiv(L, _ROWS), B, 2)](
            q_BLD, k_BLD, q_weight_D.contiguous(), k_weight_D.contiguous(), rope.contiguous(), q_out, k_out,
            L, D, eps, *q_BLD.stride()[:2],
            HEAD=head, TAIL=tail, HEAD_DIM=head_dim, ROWS=_ROWS,
            num_warps=piece_warps(head), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return q_out, k_out


def check_projections(
    q_BLD: torch.Tensor,
    k_BLD: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    rope: torch.Tensor,
    num_heads: int,
) -> None:
    """Raise ValueError unless all fit, as `qk_norm_rope` says."""
    check_float("q", q_BLD)
    check_float("q_weight", q_weight_D)
    if q_BLD.ndim != 3 or 0 in q_BLD.shape or q_BLD.stride(-1) != 1:
        raise ValueError(f"q has shape {tuple(q_BLD.shape)}, strides {q_BLD.stride()}: must be [B, L, D], rows whole")
    _, L, D = q_BLD.shape
    if (k_BLD.shape, k_BLD.dtype, k_BLD.stride(), k_BLD.device) != (
        q_BLD.shape,
        q_BLD.dtype,
        q_BLD.stride(),
        q_BLD.device,
    ):
        raise ValueError(f"k is {k_BLD.dtype} {tuple(k_BLD.shape)}, strides {k_BLD.stride()}: must be laid out as q")
    if num_heads < 1 or D % num_heads or (D // num_heads) % 2:
        raise ValueError(f"D = {D} does not split into {num_heads} heads of even size")
    head_dim = D // num_heads
    for name, weight in (("q_weight", q_weight_D), ("k_weight", k_weight_D)):
        if weight.shape != (D,) or weight.device != q_BLD.device or weight.dtype != q_weight_D.dtype:
            raise ValueError(
                f"{name} is {weight.dtype} {tuple(weight.shape)} on {weight.device}: "
                f"must be {q_weight_D.dtype} {(D,)} on {q_BLD.device}"
            )
    if rope.shape != (L, head_dim // 2, 2) or rope.dtype != torch.float32 or rope.device != q_BLD.device:
        raise ValueError(
            f"rope is {rope.dtype} {tuple(rope.shape)} on {rope.device}: "
            f"must be torch.float32 {(L, head_dim // 2, 2)} on {q_BLD.device}"
        )


@triton.jit
@no_type_check
def _rotate(b_y, p_rope, o_d, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr):
    """Turn neighbouring pairs; (cos, sin) lie in a row of the table as (even, odd) do in a head."""
    even, odd = tl.split(tl.reshape(b_y, [SIZE // 2, 2]))
    cos, sin = tl.split(tl.reshape(tl.load(p_rope + o_d % HEAD_DIM), [SIZE // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [SIZE])


@triton.jit
@no_type_check
def norm_rotate(
    b_0, b_1, w_0, w_1, p_rope, o_0, o_1, D, eps, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """Both pieces of one row, fp32 [HEAD] and [TAIL], normalised, scaled and rotated."""
    rstd = 1.0 / tl.sqrt((tl.sum(b_0 * b_0, 0) + tl.sum(b_1 * b_1, 0)) / D + eps)
    b_0 = _rotate(b_0 * rstd * w_0, p_rope, o_0, HEAD_DIM, HEAD)
    b_1 = _rotate(b_1 * rstd * w_1, p_rope, o_1, HEAD_DIM, TAIL)
    return b_0, b_1


@triton.jit(do_not_specialize=["L"])
@no_type_check
def qk_norm_rope_kernel(
    q,
    k,
    q_weight,  # [D]
    k_weight,  # [D]
    rope,  # [L, HEAD_DIM / 2, 2]
    q_out,  # [B, L, D] contiguous
    k_out,  # [B, L, D] contiguous
    L,
    D,
    eps,
    stride_b,
    stride_l,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.program_id(2) == 0:
        x, weight, out = q, q_weight, q_out
    else:
        x, weight, out = k, k_weight, k_out
    i_b = tl.program_id(1).to(tl.int64)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, TAIL)
    in_1 = o_1 < D
    w_0 = tl.load(weight + o_0).to(tl.float32)
    w_1 = tl.load(weight + o_1, mask=in_1, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i_l in range(first, tl.minimum(first + ROWS, L)):
        p_x = x + i_b * stride_b + i_l * stride_l
        b_0 = tl.load(p_x + o_0).to(tl.float32)
        b_1 = tl.load(p_x + o_1, mask=in_1, other=0.0).to(tl.float32)
        p_rope = rope + i_l * HEAD_DIM
        b_0, b_1 = norm_rotate(b_0, b_1, w_0, w_1, p_rope, o_0, o_1, D, eps, HEAD_DIM, HEAD, TAIL)
        p_out = out + (i_b * L + i_l) * D
        tl.store(p_out + o_0, b_0.to(out.dtype.element_ty))
        tl.store(p_out + o_1, b_1.to(out.dtype.element_ty), mask=in_1)
