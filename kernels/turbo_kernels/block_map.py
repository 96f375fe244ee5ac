"""Block map: for every block of queries, which blocks of keys the sparse branch attends to.

    k~    = k - mean_L(k)                                  per head and channel
    q^_i  = mean of q over query block i                   true counts in the ragged last block
    k^_j  = mean of k~ over key block j
    S     = q^ k^T                                         no 1/sqrt(D): only the order matters
    n     = clamp(int(topk * num_k_blocks), 1, num_k_blocks)
    map_i = the n key blocks of largest S_i, ascending     ties go to the lower block

Pooled means and scores stay in fp32 (upstream rounds both to the input dtype, which turns near-ties into ties and
leaves their order to the device). Source: SLA paper, upstream TurboDiffusion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.providers import resolve_provider


@dataclass(frozen=True, slots=True)
class BlockMap:
    """The key blocks each query block attends to.

    Attributes:
        indices: int32 [B, H, num_q_blocks, num_selected], ascending and distinct along the last dimension.
        block_q: queries in a block.
        block_k: keys in a block.
    """

    indices: torch.Tensor
    block_q: int
    block_k: int

    @property
    def num_selected(self) -> int:
        return int(self.indices.shape[-1])


def num_blocks(length: int, block: int) -> int:
    """Blocks that cover `length` tokens; the last may be ragged."""
    return -(-length // block)


def num_selected_blocks(topk: float, num_k_blocks: int) -> int:
    """clamp(int(topk * num_k_blocks), 1, num_k_blocks): upstream's truncation, without its zero."""
    return min(max(int(topk * num_k_blocks), 1), num_k_blocks)


def check_block_map(block_map: BlockMap, q_BLHD: torch.Tensor) -> None:
    """Raise ValueError unless `block_map` was made for tensors shaped like q."""
    B, L, H, _ = q_BLHD.shape
    indices = block_map.indices
    expected = (B, H, num_blocks(L, block_map.block_q))
    if indices.ndim != 4 or tuple(indices.shape[:3]) != expected or indices.dtype != torch.int32:
        raise ValueError(f"block map is {indices.dtype} {tuple(indices.shape)}: must be torch.int32 {expected} + (n,)")
    if not 1 <= block_map.num_selected <= num_blocks(L, block_map.block_k):
        raise ValueError(f"block map selects {block_map.num_selected} of {num_blocks(L, block_map.block_k)} key blocks")
    if indices.device != q_BLHD.device:
        raise ValueError(f"block map is on {indices.device}, q on {q_BLHD.device}")


def block_map(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    topk: float,
    provider: str | None = None,
) -> BlockMap:
    """Select key blocks by the scores of pooled queries and pooled, smoothed keys (formula above).

    Args:
        q_BLHD, k_BLHD: [B, L, H, D], D 64 or 128, any strides with the last dimension contiguous.
        block_q, block_k: 64 or 128 tokens.
        topk: share of key blocks to keep, in (0, 1].
        provider: `reference` or `triton`; None chooses by device.

    Raises:
        ValueError: shapes, dtypes, block sizes, topk or provider that do not fit.
    """
    check_attention_inputs(q=q_BLHD, k=k_BLHD)
    if block_q not in (64, 128) or block_k not in (64, 128):
        raise ValueError(f"blocks are {block_q} x {block_k}: each must be 64 or 128")
    if not 0.0 < topk <= 1.0:
        raise ValueError(f"topk is {topk}: must be in (0, 1]")
    provider = resolve_provider(provider, q_BLHD.device, op="block_map")
    num_selected = num_selected_blocks(topk, num_blocks(q_BLHD.shape[1], block_k))
    indices = torch.stack(
        [_select_reference(q, k, block_q, block_k, num_selected) for q, k in zip(q_BLHD, k_BLHD, strict=True)]
    )
    return BlockMap(indices, block_q, block_k)


def pool_blocks(x_HLD: torch.Tensor, block: int) -> torch.Tensor:
    """Mean over each block of tokens, [H, L, D] -> [H, num_blocks, D]; the last block counts its true tokens."""
    H, L, D = x_HLD.shape
    blocks = num_blocks(L, block)
    padded = F.pad(x_HLD, (0, 0, 0, blocks * block - L))
    counts = torch.full((blocks, 1), float(block), device=x_HLD.device, dtype=x_HLD.dtype)
    counts[-1] = L - (blocks - 1) * block
    return padded.view(H, blocks, block, D).sum(2) / counts


def _select_reference(
    q_LHD: torch.Tensor, k_LHD: torch.Tensor, block_q: int, block_k: int, num_selected: int
) -> torch.Tensor:
    """One sample's selected key blocks, int32 [H, num_q_blocks, num_selected]."""
    q_HLD = q_LHD.transpose(0, 1).float()
    k_HLD = k_LHD.transpose(0, 1).float()
    k_HLD = k_HLD - k_HLD.mean(1, keepdim=True)
    scores = pool_blocks(q_HLD, block_q) @ pool_blocks(k_HLD, block_k).transpose(1, 2)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :num_selected].sort(dim=-1).values.int()
