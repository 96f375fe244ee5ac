"""Gated residual: x + y * gate, in fp32, rounded once. Source: Wan2.1 (adaLN gates)."""

from __future__ import annotations

import torch

from turbo_kernels.checks import check_float
from turbo_kernels.providers import resolve_provider


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
    return torch.addcmul(x_BLD.float(), y_BLD.float(), gate_BD.float()[:, None]).to(x_BLD.dtype)
