"""Block-sparse attention in the dtype of its inputs: the sparse branch of `sla`.

    o = softmax(q k^T / sqrt(D)) v      over the keys of the selected blocks only, renormalised on them

Source: SLA paper, FlashAttention-2 for the online softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbo_kernels.block_map import BlockMap, check_block_map, num_blocks
from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.providers import resolve_provider


def sparse_attention(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    block_map: BlockMap,
    *,
    provider: str | None = None,
) -> torch.Tensor:
    """Attention of each query block over its selected key blocks; returns [B, L, H, D] in q's dtype.

    Raises:
        ValueError: inputs, block map or provider that do not fit.
    """
    check_attention_inputs(q=q_BLHD, k=k_BLHD, v=v_BLHD)
    check_block_map(block_map, q_BLHD)
    provider = resolve_provider(provider, q_BLHD.device, op="sparse_attention")
    return sparse_attention_reference(q_BLHD, k_BLHD, v_BLHD, block_map).to(q_BLHD.dtype)


def split_blocks(x_LD: torch.Tensor, block: int) -> torch.Tensor:
    """[L, D] -> fp32 [num_blocks, block, D], zeros behind the last token."""
    L, D = x_LD.shape
    blocks = num_blocks(L, block)
    return F.pad(x_LD.float(), (0, 0, 0, blocks * block - L)).view(blocks, block, D)


def sparse_attention_reference(
    q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor, block_map: BlockMap
) -> torch.Tensor:
    """The formula above in fp32, a head at a time, so that no sample sees its neighbours."""
    B, L, H, D = q_BLHD.shape
    out_BLHD = torch.empty(B, L, H, D, dtype=torch.float32, device=q_BLHD.device)
    offsets = torch.arange(block_map.block_k, device=q_BLHD.device)
    for b in range(B):
        for h in range(H):
            indices = block_map.indices[b, h].long()
            q = split_blocks(q_BLHD[b, :, h], block_map.block_q)
            k = split_blocks(k_BLHD[b, :, h], block_map.block_k)[indices].flatten(1, 2)
            v = split_blocks(v_BLHD[b, :, h], block_map.block_k)[indices].flatten(1, 2)
            keys = (indices[..., None] * block_map.block_k + offsets).flatten(1)
            scores = q @ k.transpose(1, 2) * D**-0.5
            weights = scores.masked_fill(keys[:, None] >= L, float("-inf")).softmax(-1)
            out_BLHD[b, :, h] = (weights @ v).flatten(0, 1)[:L]
    return out_BLHD
