"""Block-sparse attention with 8-bit products: the sparse branch of `sagesla`.

    k~      = k - mean_L(k)                                    softmax does not see the difference
    q8, k8  = round(x / s), s = amax/127 + 1e-7                int8, one scale a (head, block); halves away from zero
    S       = (q8 k8^T)_int32 * s_q s_k / sqrt(D)
    P       = exp(S - running row max)                         kept as P * P_MAX in the 8-bit (or 16-bit) format
    v8      = v / s_v, s_v = amax_L(|v|) / V_MAX               one scale a (head, channel)
    o       = s_v * sum(P v8) / sum(P)                         denominator from the unrounded P

P and v8 are e4m3 where the tensor cores multiply it (compute capability 8.9 and later), fp16 elsewhere. V_MAX is 448,
the largest e4m3 value, where upstream takes 2.25 so that sums in fp16 cannot overflow: these sums are fp32, and the
wider range keeps values below amax/144 out of the subnormals.
Source: SageAttention2, SLA paper, upstream TurboDiffusion (sagesla).
"""

from __future__ import annotations

import math

import torch

from turbo_kernels.block_map import BlockMap, check_block_map
from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.providers import has_fp8, resolve_provider
from turbo_kernels.sparse_attention import split_blocks

#: Largest e4m3 value: the range v8 is scaled to in either format, and P in e4m3.
V_MAX = 448.0
P_MAX_FP8 = 448.0
SCALE_FLOOR = 1e-7


def sage_attention(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    block_map: BlockMap,
    *,
    provider: str | None = None,
) -> torch.Tensor:
    """8-bit attention of each query block over its selected key blocks; returns [B, L, H, D] in q's dtype.

    Raises:
        ValueError: inputs, block map or provider that do not fit.
    """
    check_attention_inputs(q=q_BLHD, k=k_BLHD, v=v_BLHD)
    check_block_map(block_map, q_BLHD)
    provider = resolve_provider(
        provider, q_BLHD.device, op="sage_attention", available=("reference", "triton", "spargeattn")
    )
    return sage_attention_reference(q_BLHD, k_BLHD, v_BLHD, block_map).to(q_BLHD.dtype)


def quantize_blocks_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of [num_blocks, block, D] with one scale a block; values stay in fp32 for exact products."""
    scale = x.abs().amax(dim=(1, 2), keepdim=True) / 127.0 + SCALE_FLOOR
    scaled = x / scale
    return torch.trunc(scaled + 0.5 * scaled.sign()), scale


def sage_attention_reference(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    block_map: BlockMap,
    pv_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formulas above with every rounding of the kernel, in fp32, over the selected blocks in their order.

    Args:
        pv_dtype: format of P and v8, torch.float8_e4m3fn or torch.float16; None takes what the device multiplies.
    """
    B, L, H, D = q_BLHD.shape
    device = q_BLHD.device
    if pv_dtype is None:
        pv_dtype = torch.float8_e4m3fn if has_fp8(device) else torch.float16
    log2_p_max = math.log2(P_MAX_FP8) if pv_dtype == torch.float8_e4m3fn else 0.0
    to_log2 = D**-0.5 * math.log2(math.e)
    out_BLHD = torch.empty(B, L, H, D, dtype=torch.float32, device=device)
    offsets = torch.arange(block_map.block_k, device=device)
    for b in range(B):
        for h in range(H):
            indices = block_map.indices[b, h].long()
            k_LD = k_BLHD[b, :, h].float()
            v_LD = v_BLHD[b, :, h].float()
            q8, q_scale = quantize_blocks_reference(split_blocks(q_BLHD[b, :, h], block_map.block_q))
            k8, k_scale = quantize_blocks_reference(split_blocks(k_LD - k_LD.mean(0), block_map.block_k))
            v_scale = v_LD.abs().amax(0).clamp_min(1e-20) / V_MAX
            v8 = split_blocks((v_LD / v_scale).to(pv_dtype), block_map.block_k)

            row_max = torch.full((*q8.shape[:2], 1), float("-inf"), device=device)
            row_sum = torch.zeros_like(row_max)
            out = torch.zeros_like(q8)
            for i in range(block_map.num_selected):
                chosen = indices[:, i]
                keys = chosen[:, None] * block_map.block_k + offsets
                scores = (q8 @ k8[chosen].transpose(1, 2)) * (q_scale * k_scale[chosen] * to_log2)
                scores = scores.masked_fill(keys[:, None] >= L, float("-inf"))
                new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
                weights = torch.exp2(scores - new_max + log2_p_max)
                shrink = torch.exp2(row_max - new_max)
                row_sum = row_sum * shrink + weights.sum(-1, keepdim=True)
                out = out * shrink + weights.to(pv_dtype).float() @ v8[chosen]
                row_max = new_max
            out_BLHD[b, :, h] = (out / row_sum * v_scale).flatten(0, 1)[:L]
    return out_BLHD
