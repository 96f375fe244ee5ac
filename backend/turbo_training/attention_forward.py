"""Self-attention for training: dense, or block-sparse with the linear branch, with gradients and forward derivatives.

Keys and values of the selected blocks are copied together for each block of queries, so that the sparse branch costs
what it should. Shapes: B batch, H heads, L tokens, D channels of a head.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo_kernels.block_map import num_blocks, num_selected_blocks
from turbo_kernels.linear_attention import DENOMINATOR_FLOOR


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingAttention:
    """How self-attention is computed.

    Attributes:
        topk: share of key blocks in the sparse branch of sparse-linear attention; None for dense attention.
        block_q, block_k: its geometry.
        explicit: softmax(q k^T) v written out, which has forward-mode derivatives; fused kernels have none.
    """

    topk: float | None = None
    block_q: int = 128
    block_k: int = 64
    explicit: bool = False


DENSE = TrainingAttention()
#: What servers run by default, with the share that is recommended for quality.
SPARSE = TrainingAttention(topk=0.15)
#: The same as `sagesla` has it on Hopper.
SPARSE_ON_HOPPER = TrainingAttention(topk=0.15, block_q=64, block_k=128)
#: What servers run, by how often training sees it.
_SERVED = {SPARSE_ON_HOPPER: 1, SPARSE: 3}


def draw_attention(
    generator: random.Random, *, dense: float, sparse: Mapping[TrainingAttention, int] = _SERVED
) -> TrainingAttention:
    """Dense attention with probability `dense`, else one of `sparse` by how often."""
    if generator.random() < dense:
        return DENSE
    return generator.choices(tuple(sparse), tuple(sparse.values()))[0]


def attend(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bias: Tensor | None = None, *, explicit: bool) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, [B, H, L, D]; bias [B, H or 1, 1, S]."""
    if explicit:
        scores = (q_BHLD @ k_BHSD.transpose(-1, -2)).float() * q_BHLD.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return weights.to(v_BHSD.dtype) @ v_BHSD
    if bias is not None:
        bias = bias.to(q_BHLD.dtype).expand(-1, -1, q_BHLD.shape[2], -1)
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=bias)


def sparse_attend(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, chosen: Tensor, attention: TrainingAttention
) -> Tensor:
    """Attention of each block of queries to its blocks of keys, as `select_blocks` chose them, [B, H, L, D]."""
    B, H, L, D = q_BHLD.shape
    block_q, block_k = attention.block_q, attention.block_k
    num_q, num_k = chosen.shape[2], num_blocks(L, block_k)
    first = num_k * torch.arange(B * H, device=q_BHLD.device).view(B, H, 1, 1)
    rows = (chosen + first).flatten()

    def gather(x_BHLD: Tensor) -> Tensor:
        """[B, H * num_q_blocks, selected keys, D]."""
        padded = F.pad(x_BHLD, (0, 0, 0, num_k * block_k - L)).reshape(B * H * num_k, block_k * D)
        return padded.index_select(0, rows).view(B, H * num_q, -1, D)

    places = chosen[..., None] * block_k + torch.arange(block_k, device=q_BHLD.device)
    bias = torch.where(places < L, 0.0, -torch.inf).view(B, H * num_q, 1, -1)
    queries = F.pad(q_BHLD, (0, 0, 0, num_q * block_q - L)).reshape(B, H * num_q, block_q, D)
    out = attend(queries, gather(k_BHLD), gather(v_BHLD), bias, explicit=attention.explicit)
    return out.reshape(B, H, num_q * block_q, D)[:, :, :L]


def linear_attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
    """phi(q) (phi(k)^T v) / (floor + phi(q) sum phi(k)) with phi the softmax over channels."""
    dtype = v_BHLD.dtype
    phi_q, phi_k = q_BHLD.float().softmax(-1), k_BHLD.float().softmax(-1)
    numerator = phi_q.to(dtype) @ (phi_k.to(dtype).transpose(-1, -2) @ v_BHLD)
    denominator = DENOMINATOR_FLOOR + phi_q @ phi_k.sum(2, keepdim=True).transpose(-1, -2)
    return (numerator / denominator).to(dtype)


def select_blocks(q_BHLD: Tensor, k_BHLD: Tensor, attention: TrainingAttention) -> Tensor:
    """The choice of `turbo_kernels.block_map`: indices of key blocks [B, H, num_q_blocks, num_selected]."""
    assert attention.topk is not None
    pooled_q = _pool(q_BHLD.detach().float(), attention.block_q)
    keys = k_BHLD.detach().float()
    pooled_k = _pool(keys - keys.mean(2, keepdim=True), attention.block_k)
    num_selected = num_selected_blocks(attention.topk, pooled_k.shape[2])
    return (pooled_q @ pooled_k.transpose(-1, -2)).topk(num_selected, dim=-1).indices


def _pool(x_BHLD: Tensor, block: int) -> Tensor:
    """Mean of each block of tokens; the last may be shorter."""
    length = x_BHLD.shape[2]
    blocks = num_blocks(length, block)
    sums = F.pad(x_BHLD, (0, 0, 0, blocks * block - length)).unflatten(2, (blocks, block)).sum(3)
    counts = torch.full((blocks, 1), float(block), device=x_BHLD.device)
    counts[-1] = length - (blocks - 1) * block
    return sums / counts
