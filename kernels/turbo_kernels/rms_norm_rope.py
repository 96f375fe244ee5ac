"""RMSNorm over the whole model dimension, split into heads, then rotary embedding, in one pass.

    y          = x / sqrt(mean_D(x^2) + eps) * weight
    (e, o)     = neighbouring channels 2i, 2i+1 of a head
    (e', o')   = (e cos - o sin, e sin + o cos)

All in fp32, rounded once. Source: Wan2.1 (qk norm and 3-D rotary embedding).
"""

from __future__ import annotations

import torch

from turbo_kernels.checks import check_float
from turbo_kernels.providers import resolve_provider


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
    x = x_BLD.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()
    y_BLHD = y.view(B, L, num_heads, head_dim)
    if rope is not None:
        even, odd = y_BLHD[..., 0::2], y_BLHD[..., 1::2]
        cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
        y_BLHD = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return y_BLHD.to(x_BLD.dtype)
