"""Linear attention over all tokens: the branch of `sla` and `sagesla` that covers what the block map leaves out.

    phi(x) = softmax over the D channels, rounded to the input dtype in the numerator's products
    o_l    = phi(q) (phi(k)^T v) / (1e-5 + phi(q) sum_L phi(k))

Keys are not smoothed here. Source: SLA paper.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.gather import gather
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider
from turbo_kernels.summary import linear_branch, summarize

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
    if provider == "triton":
        return _linear_attention_triton(q_BLHD, k_BLHD, v_BLHD)
    return linear_attention_reference(q_BLHD, k_BLHD, v_BLHD).to(q_BLHD.dtype)


def linear_attention_reference(q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor) -> torch.Tensor:
    """The formula above in fp32, a sample at a time."""
    out = []
    for q_LHD, k_LHD, v_LHD in zip(q_BLHD, k_BLHD, v_BLHD, strict=True):
        phi_q, phi_k = (x.float().softmax(-1).transpose(0, 1) for x in (q_LHD, k_LHD))
        rounded_q, rounded_k = phi_q.to(q_LHD.dtype).float(), phi_k.to(k_LHD.dtype).float()
        numerator = rounded_q @ (rounded_k.transpose(1, 2) @ v_LHD.float().transpose(0, 1))
        denominator = DENOMINATOR_FLOOR + phi_q @ phi_k.sum(1, keepdim=True).transpose(1, 2)
        out.append((numerator / denominator).transpose(0, 1))
    return torch.stack(out)


@triton.jit(do_not_specialize=["L", "floor"])
@no_type_check
def linear_attention_kernel(
    q,
    kv,  # [BH, D, D]
    phi_sum,  # [BH, D]
    out,  # [B, L, H, D] contiguous
    L,
    floor,
    stride_qb,
    stride_ql,
    stride_qh,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_l = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_d = tl.arange(0, D)
    inside = o_l < L
    p_q = q + i_b * stride_qb + i_h * stride_qh + o_l[:, None] * stride_ql + o_d[None, :]
    b_q = tl.load(p_q, mask=inside[:, None], other=0.0)
    b_kv = tl.load(kv + i_bh * D * D + o_d[:, None] * D + o_d[None, :])
    b_out = linear_branch(b_q, inside, b_kv, phi_sum, i_bh, floor, D)
    p_out = out + ((i_b * L + o_l)[:, None] * H + i_h) * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=inside[:, None])


def _linear_attention_triton(q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor) -> torch.Tensor:
    B, L, H, D = q_BLHD.shape
    summary = summarize(k_BLHD, v_BLHD, gather(k_BLHD, lse=True), block_k=64, linear=True)
    out = torch.empty(B, L, H, D, dtype=q_BLHD.dtype, device=q_BLHD.device)
    with device_of(q_BLHD):
        linear_attention_kernel[(triton.cdiv(L, 64), B * H)](
            q_BLHD, summary.kv, summary.phi_sum, out, L, DENOMINATOR_FLOOR / L, *q_BLHD.stride()[:3], H,
            D=D, BLOCK=64, num_warps=4, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return out
