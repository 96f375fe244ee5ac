"""LayerNorm and the modulation behind it in one pass.

    y = ((x - mean) / sqrt(var + eps) [* weight + bias]) [* (1 + scale) + shift]

All in fp32 with the true biased variance over D (upstream's fast kernel adds padded lanes to it), rounded once.
Source: Wan2.1 (norms and adaLN modulation).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbo_kernels.checks import check_float
from turbo_kernels.providers import resolve_provider


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
    y = F.layer_norm(
        x_BLD.float(), (D,), None if weight is None else weight.float(), None if bias is None else bias.float(), eps
    )
    if scale_BD is not None and shift_BD is not None:
        y = y * (1.0 + scale_BD.float()[:, None]) + shift_BD.float()[:, None]
    return y.to(x_BLD.dtype)
