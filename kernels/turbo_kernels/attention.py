"""Self-attention of a Wan block as one call: `original` (dense), `sla`, or `sagesla`.

    o = sparse(q, k, v) + (linear(q, k, v) W^T + b)      W, b: proj_l, shared by the heads

Source: SLA paper, upstream TurboDiffusion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbo_kernels.block_map import block_map, select_blocks
from turbo_kernels.checks import check_attention_inputs, check_float
from turbo_kernels.fp8_linear import AMAX_FLOOR, FP8_MAX, Fp8Rows
from turbo_kernels.gather import Gathered, gather
from turbo_kernels.linear_attention import linear_attention, linear_attention_reference
from turbo_kernels.providers import is_hopper, resolve_provider
from turbo_kernels.qk_norm_rope_gather import qk_norm_rope_gather
from turbo_kernels.rms_norm_rope import rms_norm_rope
from turbo_kernels.sage_attention import sage_attention_reference, sage_attention_triton
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
        ready = _Ready.of(q_BLHD, k_BLHD, attention_type)
        return _sla_triton(ready, v_BLHD, (proj_weight_DD, proj_bias_D), attention_type, topk)
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
    if provider == "triton":
        return _sagesla_triton_fp8(_Ready.of(q_BLHD, k_BLHD, "sagesla"), v_BLHD, (proj_weight_DD, proj_bias_D), topk)
    if provider != "reference":
        raise ValueError(f"provider {provider!r} does not offer sagesla attention in e4m3: one of reference, triton")
    out = sla_attention(*(x.float() for x in arguments), attention_type="sagesla", topk=topk, provider=provider)
    v_amax_BHD = v_BLHD.abs().amax(1).float()
    bound_BHD = v_amax_BHD + v_amax_BHD @ proj_weight_DD.float().abs().t() + proj_bias_D.float().abs()
    scale_B = bound_BHD.amax((1, 2)).clamp_min(AMAX_FLOOR) * (1.0 / FP8_MAX)
    scaled = (out.flatten(2) / scale_B[:, None, None]).clamp(-FP8_MAX, FP8_MAX)
    return Fp8Rows(scaled.to(torch.float8_e4m3fn), scale_B[:, None].expand(scaled.shape[:2]).contiguous())


def sla_attention_of_projections(
    q_BLM: torch.Tensor,
    k_BLM: torch.Tensor,
    v_BLHD: torch.Tensor,
    q_weight_M: torch.Tensor,
    k_weight_M: torch.Tensor,
    rope: torch.Tensor,
    proj_weight_DD: torch.Tensor,
    proj_bias_D: torch.Tensor,
    *,
    attention_type: str,
    topk: float,
    eps: float,
    fp8: bool = False,
    provider: str | None = None,
) -> torch.Tensor | Fp8Rows:
    """`rms_norm_rope` of q and k, then `sla_attention` or, with `fp8`, `sagesla_attention_fp8`: their arguments.

    Our kernels gather what attention needs to know of queries and keys while they norm and rotate them.

    Raises:
        ValueError: any argument that does not fit, or a provider that cannot run here.
    """
    if fp8 and attention_type != "sagesla":
        raise ValueError(f"attention type {attention_type!r} is not offered in e4m3: only sagesla")
    proj_l = proj_weight_DD, proj_bias_D
    num_heads = v_BLHD.shape[2]
    q_heads, k_heads = (x.view(*x.shape[:-1], num_heads, -1) for x in (q_BLM, k_BLM))
    provider = _check_sla(q_heads, k_heads, v_BLHD, *proj_l, attention_type, provider)
    if provider == "triton":
        int8 = attention_type == "sagesla"
        projections = q_BLM, k_BLM, q_weight_M, k_weight_M, rope
        ready = _Ready(*qk_norm_rope_gather(*projections, num_heads=num_heads, eps=eps, int8=int8))
        if fp8:
            return _sagesla_triton_fp8(ready, v_BLHD, proj_l, topk)
        return _sla_triton(ready, v_BLHD, proj_l, attention_type, topk)
    normed_by = "reference" if provider == "reference" else "triton"
    q_BLHD, k_BLHD = (
        rms_norm_rope(x_BLM, weight_M, rope, num_heads=num_heads, eps=eps, provider=normed_by)
        for x_BLM, weight_M in ((q_BLM, q_weight_M), (k_BLM, k_weight_M))
    )
    if fp8:
        return sagesla_attention_fp8(q_BLHD, k_BLHD, v_BLHD, *proj_l, topk=topk, provider=provider)
    return sla_attention(q_BLHD, k_BLHD, v_BLHD, *proj_l, attention_type=attention_type, topk=topk, provider=provider)


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


@dataclass(frozen=True, slots=True)
class _Ready:
    """Queries and keys [B, L, H, D], normalised and rotated, and what was gathered of each."""

    queries: torch.Tensor
    of_queries: Gathered
    keys: torch.Tensor
    of_keys: Gathered

    @classmethod
    def of(cls, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, attention_type: str) -> _Ready:
        return cls(q_BLHD, gather(q_BLHD, int8=attention_type == "sagesla"), k_BLHD, gather(k_BLHD, lse=True))


def _sagesla_triton_fp8(
    ready: _Ready, v_BLHD: torch.Tensor, proj_l: tuple[torch.Tensor, torch.Tensor], topk: float
) -> Fp8Rows:
    scale_BL = torch.empty(v_BLHD.shape[:2], dtype=torch.float32, device=v_BLHD.device)
    return Fp8Rows(_sla_triton(ready, v_BLHD, proj_l, "sagesla", topk, scale_BL).flatten(2), scale_BL)


def _sla_triton(
    ready: _Ready,
    v_BLHD: torch.Tensor,
    proj_l: tuple[torch.Tensor, torch.Tensor],
    attention_type: str,
    topk: float,
    out_scale_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass over k and v, selection, (quantisation,) then both branches in the attention kernel.

    proj_l goes into the [D, D] summary of the linear branch, since (phi(q) KV / n) W^T = phi(q) (KV W^T) / n.
    """
    q_BLHD, of_queries, k_BLHD, of_keys = ready.queries, ready.of_queries, ready.keys, ready.of_keys
    weight_DD, bias_D = (part.contiguous() for part in proj_l)
    block_q, block_k = attention_geometry(attention_type, q_BLHD.device)
    summary = summarize(k_BLHD, v_BLHD, of_keys, block_k=block_k, linear=True, proj_l=(weight_DD, bias_D))
    selected = select_blocks(
        of_queries.sums, summary.pooled_k, summary.k_mean, q_BLHD.shape, block_q=block_q, block_k=block_k, topk=topk
    )
    if attention_type == "sagesla":
        return sage_attention_triton(q_BLHD, k_BLHD, v_BLHD, selected, of_queries, summary, bias_D, out_scale_BL)
    return sparse_attention_triton(q_BLHD, k_BLHD, v_BLHD, selected, summary, bias_D)


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
