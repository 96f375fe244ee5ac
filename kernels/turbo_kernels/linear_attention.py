"""Linear attention over all tokens: the branch of `sla` and `sagesla` that covers what the block map leaves out.

    phi(x) = softmax over the D channels, rounded to the input dtype
    o_l    = phi(q) (phi(k)^T v) / (1e-5 + phi(q) sum_L phi(k))

Keys are not smoothed here. Source: SLA paper.
"""

from __future__ import annotations

import torch

from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.providers import resolve_provider

DENOMINATOR_FLOOR = 1e-5


def linear_attention(
    q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor, *, provider: str | None = None
) -> torch.Tensor:
    """Softmax-feature linear attention; returns [B, L, H, D] in q's dtype.

    Raises:
        ValueError: inputs or provider that do not fit.
    """
    check_attention_inputs(q=q_BLHD, k=k_BLHD, v=v_BLHD)
    provider = resolve_provider(provider, q_BLHD.device, op="linear_attention")
    return linear_attention_reference(q_BLHD, k_BLHD, v_BLHD).to(q_BLHD.dtype)


def linear_attention_reference(q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor) -> torch.Tensor:
    """The formula above in fp32, a sample at a time."""
    out = []
    for q_LHD, k_LHD, v_LHD in zip(q_BLHD, k_BLHD, v_BLHD, strict=True):
        phi_q = q_LHD.float().softmax(-1).to(q_LHD.dtype).float().transpose(0, 1)
        phi_k = k_LHD.float().softmax(-1).to(k_LHD.dtype).float().transpose(0, 1)
        numerator = phi_q @ (phi_k.transpose(1, 2) @ v_LHD.float().transpose(0, 1))
        denominator = DENOMINATOR_FLOOR + phi_q @ phi_k.sum(1, keepdim=True).transpose(1, 2)
        out.append((numerator / denominator).transpose(0, 1))
    return torch.stack(out)
