"""Self-attention of a Wan block as one call: `original` (dense), `sla`, or `sagesla`.

    o = sparse(q, k, v) + (linear(q, k, v) W^T + b)      W, b: proj_l, shared by the heads

Source: SLA paper, upstream TurboDiffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbo_kernels.block_map import block_map
from turbo_kernels.checks import check_attention_inputs, check_float
from turbo_kernels.linear_attention import linear_attention_reference
from turbo_kernels.providers import resolve_provider
from turbo_kernels.sage_attention import sage_attention_reference
from turbo_kernels.sparse_attention import sparse_attention_reference

SPARSE_TYPES = ("sla", "sagesla")


def attention_geometry(attention_type: str, device: torch.device | str) -> tuple[int, int]:
    """(block_q, block_k) that upstream uses: `sagesla` takes (64, 128) on Hopper, all else is (128, 64).

    Raises:
        ValueError: an attention type without blocks.
    """
    if attention_type not in SPARSE_TYPES:
        raise ValueError(f"attention type {attention_type!r} has no block geometry: one of {', '.join(SPARSE_TYPES)}")
    device = torch.device(device)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return (64, 128) if attention_type == "sagesla" and hopper else (128, 64)


def sla_attention(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    proj_weight_DD: torch.Tensor,
    proj_bias_D: torch.Tensor,
    *,
    attention_type: str,
    topk: float,
    provider: str | None = None,
) -> torch.Tensor:
    """Sparse-linear attention; returns [B, L, H, D] in q's dtype.

    Args:
        q_BLHD, k_BLHD, v_BLHD: [B, L, H, D], D 64 or 128, after normalisation and rotary embedding.
        proj_weight_DD, proj_bias_D: `proj_l`, applied to the linear branch of every head.
        attention_type: `sla` or `sagesla`.
        topk: share of key blocks in the sparse branch, in (0, 1].
        provider: `reference`, `triton`, or `spargeattn` (sagesla only); None chooses by device.

    Raises:
        ValueError: any argument that does not fit, or a provider that cannot run here.
    """
    check_attention_inputs(q=q_BLHD, k=k_BLHD, v=v_BLHD)
    D = q_BLHD.shape[-1]
    check_float("proj_weight", proj_weight_DD)
    check_float("proj_bias", proj_bias_D)
    if proj_weight_DD.shape != (D, D) or proj_bias_D.shape != (D,):
        raise ValueError(
            f"proj_l has shapes {tuple(proj_weight_DD.shape)}, {tuple(proj_bias_D.shape)}: must be {(D, D)}, {(D,)}"
        )
    block_q, block_k = attention_geometry(attention_type, q_BLHD.device)
    available = ("reference", "triton", "spargeattn") if attention_type == "sagesla" else ("reference", "triton")
    provider = resolve_provider(provider, q_BLHD.device, op=f"{attention_type} attention", available=available)
    selected = block_map(q_BLHD, k_BLHD, block_q=block_q, block_k=block_k, topk=topk, provider=provider)
    sparse = sage_attention_reference if attention_type == "sagesla" else sparse_attention_reference
    linear = linear_attention_reference(q_BLHD, k_BLHD, v_BLHD)
    projected = torch.stack([F.linear(x, proj_weight_DD.float(), proj_bias_D.float()) for x in linear])
    return (sparse(q_BLHD, k_BLHD, v_BLHD, selected) + projected).to(q_BLHD.dtype)


def dense_attention(
    q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor, *, provider: str | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over all keys; returns [B, L, H, D] in q's dtype.

    PyTorch's scaled_dot_product_attention for either provider, a sample at a time: which algorithm it picks, and so
    the bits of a sample, may depend on the batch size.

    Raises:
        ValueError: inputs or provider that do not fit.
    """
    check_attention_inputs(q=q_BLHD, k=k_BLHD, v=v_BLHD)
    resolve_provider(provider, q_BLHD.device, op="dense attention")
    samples = zip(q_BLHD.split(1), k_BLHD.split(1), v_BLHD.split(1), strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
            for q, k, v in samples
        ]
    )
