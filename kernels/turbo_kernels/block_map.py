"""Block map: for every block of queries, which blocks of keys the sparse branch attends to.

    k~    = k - mean_L(k)                                  per head and channel
    q^_i  = mean of q over query block i                   true counts in the ragged last block
    k^_j  = mean of k~ over key block j
    S     = q^ k^T                                         no 1/sqrt(D): only the order matters
    n     = clamp(int(topk * num_k_blocks), 1, num_k_blocks)
    map_i = the n key blocks of largest S_i, ascending     ties go to the lower block

Pooled means and scores stay in fp32 (upstream rounds both to the input dtype, which turns near-ties into ties and
leaves their order to the device). On the GPU a first stage writes all scores and a second one selects, a row a program:
the n-th largest score by bisection on its bits, then positions by prefix sums, so that no list is built serially.
Source: SLA paper, upstream TurboDiffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.gather import GROUP, gather, pool_groups
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

#: Key blocks a row of scores is padded to: one compiled kernel each, whatever the length.
_ROW_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_SCORE_TILE = 64


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
    if provider == "triton":
        return _block_map_triton(q_BLHD, k_BLHD, block_q, block_k, topk)
    num_selected = num_selected_blocks(topk, num_blocks(q_BLHD.shape[1], block_k))
    indices = torch.stack(
        [_select_reference(q, k, block_q, block_k, num_selected) for q, k in zip(q_BLHD, k_BLHD, strict=True)]
    )
    return BlockMap(indices, block_q, block_k)


def pool_blocks_reference(x_HLD: torch.Tensor, block: int) -> torch.Tensor:
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
    scores = pool_blocks_reference(q_HLD, block_q) @ pool_blocks_reference(k_HLD, block_k).transpose(1, 2)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :num_selected].sort(dim=-1).values.int()


@triton.jit(do_not_specialize=["L", "num_groups", "num_blocks"])
@no_type_check
def pool_kernel(
    sums,  # [BH, num_groups, D]
    pooled,  # [BH, num_blocks, D]
    mean,  # [BH, D]
    L,
    num_groups,
    num_blocks,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    i_bh = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([D], dtype=tl.float32)
    for start in range(0, L, GROUPS * GROUP):
        b_sum += pool_groups(
            sums, pooled, i_bh, start, start + GROUPS * GROUP, L, num_groups, num_blocks, D, BLOCK, GROUP, GROUPS
        )
    tl.store(mean + i_bh * D + tl.arange(0, D), b_sum / L)


@triton.jit(do_not_specialize=["L", "num_groups", "num_q_blocks", "num_k_blocks"])
@no_type_check
def score_kernel(
    q_sums,  # [BH, num_groups, D]
    pooled_k,  # [BH, num_k_blocks, D]
    k_mean,  # [BH, D]
    scores,  # [BH, num_q_blocks, num_k_blocks]
    L,
    num_groups,
    num_q_blocks,
    num_k_blocks,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    i_bh = tl.program_id(2).to(tl.int64)
    o_q = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o_k = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_d = tl.arange(0, D)
    b_q = tl.zeros([TILE, D], dtype=tl.float32)
    for i in tl.static_range(BLOCK_Q // GROUP):
        o_g = o_q * (BLOCK_Q // GROUP) + i
        p_q = q_sums + (i_bh * num_groups + o_g)[:, None] * D + o_d[None, :]
        b_q += tl.load(p_q, mask=(o_g < num_groups)[:, None], other=0.0)
    b_q = b_q / tl.maximum(tl.minimum(BLOCK_Q, L - o_q * BLOCK_Q), 1).to(tl.float32)[:, None]
    p_k = pooled_k + (i_bh * num_k_blocks + o_k)[:, None] * D + o_d[None, :]
    b_k = tl.load(p_k, mask=(o_k < num_k_blocks)[:, None], other=0.0)
    b_k = b_k - tl.load(k_mean + i_bh * D + o_d)[None, :]
    # Three TF32 products keep fp32's accuracy on tensor cores; plain fp32 would take 20 times as long.
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
    inside = (o_q < num_q_blocks)[:, None] & (o_k < num_k_blocks)[None, :]
    p_scores = scores + (i_bh * num_q_blocks + o_q)[:, None] * num_k_blocks + o_k[None, :]
    tl.store(p_scores, b_scores, mask=inside)


@triton.jit(do_not_specialize=["num_k_blocks", "num_selected"])
@no_type_check
def select_kernel(
    scores,  # [rows, num_k_blocks]
    indices,  # [rows, num_selected]
    num_k_blocks,
    num_selected,
    ROW: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, ROW)
    inside = o_k < num_k_blocks
    # + 0.0 makes -0.0 and 0.0 the tie that they are.
    b_scores = tl.load(scores + i_row * num_k_blocks + o_k, mask=inside, other=0.0) + 0.0
    # Integers in the order of the scores; nothing finite maps to the lowest, which marks the padding.
    b_bits = b_scores.to(tl.int32, bitcast=True)
    b_keys = tl.where(inside, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), -0x80000000)
    # The largest threshold that at least num_selected keys reach, from the highest bit down, or the first one found
    # that just num_selected reach: scores that differ part long before the last bit.
    threshold = tl.full([], -0x80000000, dtype=tl.int32)
    bit = tl.full([], -0x80000000, dtype=tl.int32)
    num_reached = num_k_blocks + 0
    while (bit != 0) & (num_reached != num_selected):
        candidate = threshold ^ bit
        reached = tl.sum((b_keys >= candidate).to(tl.int32), 0)
        threshold = tl.where(reached >= num_selected, candidate, threshold)
        num_reached = tl.where(reached >= num_selected, reached, num_reached)
        bit = (bit >> 1) & 0x7FFFFFFF
    chosen = (b_keys >= threshold) & inside
    if num_reached != num_selected:
        above = b_keys > threshold
        num_tied = num_selected - tl.sum(above.to(tl.int32), 0)
        tied = chosen & (b_keys == threshold)
        chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= num_tied))
    o_out = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(indices + i_row * num_selected + o_out, o_k, mask=chosen)


def select_blocks(
    q_sums: torch.Tensor,
    pooled_k: torch.Tensor,
    k_mean: torch.Tensor,
    shape_BLHD: torch.Size,
    *,
    block_q: int,
    block_k: int,
    topk: float,
) -> BlockMap:
    """Scores, then selection, from `gather`'s sums of queries and pooled keys."""
    B, L, H, D = shape_BLHD
    BH, num_groups, _ = q_sums.shape
    num_q_blocks, num_k_blocks = num_blocks(L, block_q), num_blocks(L, block_k)
    num_selected = num_selected_blocks(topk, num_k_blocks)
    row = next((size for size in _ROW_SIZES if size >= num_k_blocks), None)
    if row is None:
        raise ValueError(f"{num_k_blocks} key blocks: at most {_ROW_SIZES[-1]} can be ranked")
    scores = torch.empty(BH, num_q_blocks, num_k_blocks, dtype=torch.float32, device=q_sums.device)
    indices = torch.empty(B, H, num_q_blocks, num_selected, dtype=torch.int32, device=q_sums.device)
    with device_of(q_sums):
        score_kernel[(triton.cdiv(num_k_blocks, _SCORE_TILE), triton.cdiv(num_q_blocks, _SCORE_TILE), BH)](
            q_sums, pooled_k, k_mean, scores, L, num_groups, num_q_blocks, num_k_blocks,
            D=D, BLOCK_Q=block_q, GROUP=GROUP, TILE=_SCORE_TILE,
            num_warps=4, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
        select_kernel[(BH * num_q_blocks,)](
            scores, indices, num_k_blocks, num_selected,
            ROW=row, num_warps=max(1, row // 1024), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return BlockMap(indices, block_q, block_k)


def _block_map_triton(q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, block_q: int, block_k: int, topk: float) -> BlockMap:
    B, L, H, D = q_BLHD.shape
    k_sums = gather(k_BLHD).sums
    num_k_blocks = num_blocks(L, block_k)
    pooled_k = torch.empty(B * H, num_k_blocks, D, dtype=torch.float32, device=q_BLHD.device)
    k_mean = torch.empty(B * H, D, dtype=torch.float32, device=q_BLHD.device)
    with device_of(q_BLHD):
        pool_kernel[(B * H,)](
            k_sums, pooled_k, k_mean, L, k_sums.shape[1], num_k_blocks,
            D=D, BLOCK=block_k, GROUP=GROUP, GROUPS=32, num_warps=4, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    q_sums = gather(q_BLHD).sums
    return select_blocks(q_sums, pooled_k, k_mean, q_BLHD.shape, block_q=block_q, block_k=block_k, topk=topk)
