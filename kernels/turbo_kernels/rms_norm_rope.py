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
from turbo_kernels.fp8_linear import piece_warps, row_pieces
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

#: Tokens a program takes one after another.
_ROWS = 4


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
    check_norm_rope("x", x_BLD, weight_D, rope, num_heads)
    provider = resolve_provider(provider, x_BLD.device, op="rms_norm_rope")
    if provider == "triton":
        return _rms_norm_rope_triton(x_BLD, weight_D, rope, num_heads, eps)
    x = x_BLD.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()
    y_BLHD = y.view(*y.shape[:-1], num_heads, -1)
    if rope is not None:
        even, odd = y_BLHD[..., 0::2], y_BLHD[..., 1::2]
        cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
        y_BLHD = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return y_BLHD.to(x_BLD.dtype)


def check_norm_rope(
    name: str, x_BLD: torch.Tensor, weight_D: torch.Tensor, rope: torch.Tensor | None, num_heads: int
) -> None:
    """Raise ValueError unless all fit, as `rms_norm_rope` says; `name` is that of x in the message."""
    check_float(name, x_BLD)
    check_float(f"weight of {name}", weight_D)
    if x_BLD.ndim != 3 or 0 in x_BLD.shape or x_BLD.stride(-1) != 1:
        raise ValueError(f"{name} is {tuple(x_BLD.shape)}, strides {x_BLD.stride()}: must be [B, L, D], rows whole")
    _, L, D = x_BLD.shape
    if num_heads < 1 or D % num_heads or (D // num_heads) % 2:
        raise ValueError(f"D = {D} does not split into {num_heads} heads of even size")
    if weight_D.shape != (D,) or weight_D.device != x_BLD.device:
        raise ValueError(
            f"weight of {name} is {tuple(weight_D.shape)} on {weight_D.device}: must be {(D,)} on {x_BLD.device}"
        )
    table = (L, D // num_heads // 2, 2)
    if rope is not None and (rope.shape != table or rope.dtype != torch.float32 or rope.device != x_BLD.device):
        raise ValueError(
            f"rope is {rope.dtype} {tuple(rope.shape)} on {rope.device}: "
            f"must be torch.float32 {table} on {x_BLD.device}"
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
    b_0, b_1, w_0, w_1, p_rope, o_0, o_1, D, eps,
    HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Both pieces of one row, fp32 [HEAD] and [TAIL], normalised, scaled and, where asked for, rotated."""
    rstd = 1.0 / tl.sqrt((tl.sum(b_0 * b_0, 0) + tl.sum(b_1 * b_1, 0)) / D + eps)
    b_0 = b_0 * rstd * w_0
    b_1 = b_1 * rstd * w_1
    if ROTATE:
        b_0 = _rotate(b_0, p_rope, o_0, HEAD_DIM, HEAD)
        b_1 = _rotate(b_1, p_rope, o_1, HEAD_DIM, TAIL)
    return b_0, b_1


@triton.jit(do_not_specialize=["L"])
@no_type_check
def rms_norm_rope_kernel(
    x,
    weight,  # [D]
    rope,  # [L, HEAD_DIM / 2, 2], ROTATE only
    y,  # [B, L, D] contiguous
    L,
    D,
    eps,
    stride_b,
    stride_l,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
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
        b_0, b_1 = norm_rotate(b_0, b_1, w_0, w_1, p_rope, o_0, o_1, D, eps, HEAD_DIM, HEAD, TAIL, ROTATE)
        p_y = y + (i_b * L + i_l) * D
        tl.store(p_y + o_0, b_0.to(y.dtype.element_ty))
        tl.store(p_y + o_1, b_1.to(y.dtype.element_ty), mask=in_1)


def _rms_norm_rope_triton(
    x_BLD: torch.Tensor, weight_D: torch.Tensor, rope: torch.Tensor | None, num_heads: int, eps: float
) -> torch.Tensor:
    B, L, D = x_BLD.shape
    y = torch.empty(B, L, num_heads, D // num_heads, dtype=x_BLD.dtype, device=x_BLD.device)
    head, tail = (max(piece, 2) for piece in row_pieces(D))  # pairs are turned
    with device_of(x_BLD):
        rms_norm_rope_kernel[(triton.cdiv(L, _ROWS), B)](
            x_BLD, weight_D.contiguous(), x_BLD if rope is None else rope.contiguous(), y, L, D, eps,
            *x_BLD.stride()[:2],
            HEAD=head, TAIL=tail, HEAD_DIM=D // num_heads, ROWS=_ROWS, ROTATE=rope is not None,
            num_warps=piece_warps(head), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return y
