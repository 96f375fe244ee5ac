"""Self-attention of a Wan block as one call: `original` (dense), `sla`, or `sagesla`.

    o = sparse(q, k, v) + (linear(q, k, v) W^T + b)      W, b: proj_l, shared by the heads

Source: SLA paper, upstream TurboDiffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbo_kernels.block_map import (
    BlockMap,
    block_map,
    num_blocks,
    num_selected_blocks,
    pool_blocks_triton,
    select_blocks,
)
from turbo_kernels.checks import check_attention_inputs, check_float
from turbo_kernels.fp8_linear import AMAX_FLOOR, FP8_MAX, Fp8Rows
from turbo_kernels.linear_attention import linear_attention, linear_attention_reference
from turbo_kernels.providers import is_hopper, resolve_provider
from turbo_kernels.sage_attention import prepare_queries, sage_attention_reference, sage_attention_triton
from turbo_kernels.spargeattn import sage_attention_spargeattn
from turbo_kernels.sparse_attention import sparse_attention_reference, sparse_attention_triton
from turbo_kernels.summary import summarize

SPARSE_TYPES = ("sla", "sagesla")
_DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention_geometry(attention_type: str, device: torch.device | str) -> tuple[int, int]:
    """(block_q, block_k) that upstream uses: `sagesla` takes (64, 128) on Hopper, all else is (128, 64).

    Raises:
        ValueError: an attention type without blocks.
    """
    if attention_type not in SPARSE_TYPES:
        raise ValueError(f"attention type {attention_type!r} has no block geometry: one of {', '.join(SPARSE_TYPES)}")
    return (64, 128) if attention_type == "sagesla" and is_hopper(torch.device(device)) else (128, 64)


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
    provider = _check_sla(q_BLHD, k_BLHD, v_BLHD, proj_weight_DD, proj_bias_D, attention_type, provider)
    if provider == "triton":
        return _sla_triton(q_BLHD, k_BLHD, v_BLHD, proj_weight_DD, proj_bias_D, attention_type, topk, None)
    block_q, block_k = attention_geometry(attention_type, q_BLHD.device)
    pooled_by = "reference" if provider == "reference" else "triton"
    selected = block_map(q_BLHD, k_BLHD, block_q=block_q, block_k=block_k, topk=topk, provider=pooled_by)
    if provider == "spargeattn":
        sparse = sage_attention_spargeattn(q_BLHD, k_BLHD, v_BLHD, selected)
        linear = linear_attention(q_BLHD, k_BLHD, v_BLHD, provider="triton")
        return sparse + F.linear(linear, proj_weight_DD.to(linear.dtype), proj_bias_D.to(linear.dtype))
    sparse_branch = sage_attention_reference if attention_type == "sagesla" else sparse_attention_reference
    linear = linear_attention_reference(q_BLHD, k_BLHD, v_BLHD)
    projected = torch.stack([F.linear(x, proj_weight_DD.float(), proj_bias_D.float()) for x in linear])
    return (sparse_branch(q_BLHD, k_BLHD, v_BLHD, selected) + projected).to(q_BLHD.dtype)


def sagesla_attention_fp8(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    proj_weight_DD: torch.Tensor,
    proj_bias_D: torch.Tensor,
    *,
    topk: float,
    provider: str | None = None,
) -> Fp8Rows:
    """`sla_attention` of type `sagesla` as e4m3 rows [B, L, H * D], ready for the next product.

    The rows of a sample have one scale, the bound of its output (`summary`) over 448: a few binades above the largest
    value, of which e4m3 has fifteen.

    Args:
        provider: `reference` or `triton`; None chooses by device.

    Raises:
        ValueError: any argument that does not fit, or a provider that cannot run here.
    """
    arguments = q_BLHD, k_BLHD, v_BLHD, proj_weight_DD, proj_bias_D
    provider = _check_sla(*arguments, "sagesla", provider)
    B, L, H, D = q_BLHD.shape
    if provider == "triton":
        scale_BL = torch.empty(B, L, dtype=torch.float32, device=q_BLHD.device)
        values = _sla_triton(*arguments, "sagesla", topk, scale_BL)
        return Fp8Rows(values.view(B, L, H * D), scale_BL)
    if provider != "reference":
        raise ValueError(f"provider {provider!r} does not offer sagesla attention in e4m3: one of reference, triton")
    out = sla_attention(*(x.float() for x in arguments), attention_type="sagesla", topk=topk, provider=provider)
    v_amax_BHD = v_BLHD.abs().amax(1).float()
    bound_BHD = v_amax_BHD + v_amax_BHD @ proj_weight_DD.float().abs().t() + proj_bias_D.float().abs()
    scale_B = bound_BHD.amax((1, 2)).clamp_min(AMAX_FLOOR) * (1.0 / FP8_MAX)
    scaled = (out.flatten(2) / scale_B[:, None, None]).clamp(-FP8_MAX, FP8_MAX)
    return Fp8Rows(scaled.to(torch.float8_e4m3fn), scale_B[:, None].expand(B, L).contiguous())


def _check_sla(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    proj_weight_DD: torch.Tensor,
    proj_bias_D: torch.Tensor,
    attention_type: str,
    provider: str | None,
) -> str:
    """The provider that will run.

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
    attention_geometry(attention_type, q_BLHD.device)  # refuses another type
    available = ("reference", "triton", "spargeattn") if attention_type == "sagesla" else ("reference", "triton")
    return resolve_provider(provider, q_BLHD.device, op=f"{attention_type} attention", available=available)


def _sla_triton(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    proj_weight_DD: torch.Tensor,
    proj_bias_D: torch.Tensor,
    attention_type: str,
    topk: float,
    out_scale_BL: torch.Tensor | None,
) -> torch.Tensor:
    """One pass over k and v, one over q, selection, (quantisation,) then both branches in the attention kernel.

    proj_l goes into the [D, D] summary of the linear branch, since (phi(q) KV / n) W^T = phi(q) (KV W^T) / n.
    """
    B, L, H, _ = q_BLHD.shape
    block_q, block_k = attention_geometry(attention_type, q_BLHD.device)
    num_selected = num_selected_blocks(topk, num_blocks(L, block_k))
    shape = (B, H, num_blocks(L, block_q), num_selected)
    proj_l = proj_weight_DD.contiguous(), proj_bias_D.contiguous()
    summary = summarize(k_BLHD, v_BLHD, block_k=block_k, linear=True, proj_l=proj_l)
    if attention_type == "sagesla":
        queries = prepare_queries(q_BLHD, block_q)
        indices = select_blocks(queries.pooled, summary.pooled_k, summary.k_mean, num_selected, shape)
        selected = BlockMap(indices, block_q, block_k)
        return sage_attention_triton(q_BLHD, k_BLHD, v_BLHD, selected, queries, summary, proj_bias_D, out_scale_BL)
    pooled_q = pool_blocks_triton(q_BLHD, block_q)
    indices = select_blocks(pooled_q, summary.pooled_k, summary.k_mean, num_selected, shape)
    selected = BlockMap(indices, block_q, block_k)
    return sparse_attention_triton(q_BLHD, k_BLHD, v_BLHD, selected, summary, proj_bias_D)


def dense_attention(
    q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor, *, provider: str | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over all keys; returns [B, L, H, D] in q's dtype.

    PyTorch's scaled_dot_product_attention for either provider, cuDNN's first where it fits, as the fastest one on
    Hopper. Called a sample at a time: which algorithm it picks, and so the bits of a sample, may otherwise depend on
    the batch size.

    Raises:
        ValueError: inputs or provider that do not fit.
    """
    check_attention_inputs(q=q_BLHD, k=k_BLHD, v=v_BLHD)
    resolve_provider(provider, q_BLHD.device, op="dense attention")
    with sdpa_kernel(_DENSE_BACKENDS, set_priority=True):
        samples = [
            F.scaled_dot_product_attention(
                q_BLHD[b : b + 1].transpose(1, 2), k_BLHD[b : b + 1].transpose(1, 2), v_BLHD[b : b + 1].transpose(1, 2)
            ).transpose(1, 2)
            for b in range(q_BLHD.shape[0])
        ]
    return samples[0] if len(samples) == 1 else torch.cat(samples)
