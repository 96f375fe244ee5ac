"""Block-sparse attention in the dtype of its inputs: the sparse branch of `sla`.

    o = softmax(q k^T / sqrt(D)) v      over the keys of the selected blocks only, renormalised on them

Source: SLA paper, FlashAttention-2 for the online softmax.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.block_map import BlockMap, check_block_map, num_blocks
from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.linear_attention import DENOMINATOR_FLOOR
from turbo_kernels.providers import FUSE_FMA, device_of, is_hopper, resolve_provider
from turbo_kernels.summary import Summary, linear_branch


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
    if provider == "triton":
        return sparse_attention_triton(q_BLHD, k_BLHD, v_BLHD, block_map)
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


@triton.jit
@no_type_check
def _attend(
    b_q, p_k, p_v, i_block, stride_kl, stride_vl, L, row_max, row_sum, acc, scale,
    BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running softmax; RAGGED masks what lies past the sequence."""
    start = i_block.to(tl.int64) * BLOCK_K
    if RAGGED:
        inside = start + tl.arange(0, BLOCK_K) < L
        b_k = tl.load(p_k + start * stride_kl, mask=inside[:, None], other=0.0)  # [BLOCK_K, D]
        b_v = tl.load(p_v + start * stride_vl, mask=inside[:, None], other=0.0)  # [BLOCK_K, D]
    else:
        b_k = tl.load(p_k + start * stride_kl)
        b_v = tl.load(p_v + start * stride_vl)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
    if RAGGED:
        b_s = tl.where(inside[None, :], b_s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(b_p, 1)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["L", "num_q_blocks", "num_selected", "floor"])
@no_type_check
def sparse_attention_kernel(
    q,
    k,
    v,
    indices,  # [BH, num_q_blocks, num_selected]
    kv,  # [BH, D, D], LINEAR only
    phi_sum,  # [BH, D], LINEAR only
    proj_bias,  # [D], LINEAR only
    out,  # [B, L, H, D] contiguous
    L,
    num_q_blocks,
    num_selected,
    floor,
    scale,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    H,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINEAR: tl.constexpr,
):
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_q = (i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    o_d = tl.arange(0, D)
    inside = o_q < L
    p_q = q + i_b * stride_qb + i_h * stride_qh + o_q[:, None] * stride_ql + o_d[None, :]
    p_k = k + i_b * stride_kb + i_h * stride_kh + o_k[:, None] * stride_kl + o_d[None, :]
    p_v = v + i_b * stride_vb + i_h * stride_vh + o_k[:, None] * stride_vl + o_d[None, :]
    p_index = indices + (i_bh * num_q_blocks + i_q) * num_selected
    b_q = tl.load(p_q, mask=inside[:, None], other=0.0)
    row_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    # Ascending indices: only the last one can be the ragged block.
    for i in range(num_selected - 1):
        row_max, row_sum, acc = _attend(
            b_q, p_k, p_v, tl.load(p_index + i), stride_kl, stride_vl, L, row_max, row_sum, acc, scale,
            BLOCK_K, False,
        )  # fmt: skip
    row_max, row_sum, acc = _attend(
        b_q, p_k, p_v, tl.load(p_index + num_selected - 1), stride_kl, stride_vl, L, row_max, row_sum, acc, scale,
        BLOCK_K, True,
    )  # fmt: skip
    acc = acc * (1.0 / row_sum)[:, None]
    if LINEAR:
        b_kv = tl.load(kv + i_bh * D * D + o_d[:, None] * D + o_d[None, :])
        b_linear = linear_branch(b_q, inside, b_kv, phi_sum, i_bh, floor, D)
        acc += b_linear + tl.load(proj_bias + o_d).to(tl.float32)[None, :]
    p_out = out + ((i_b * L + o_q)[:, None] * H + i_h) * D + o_d[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=inside[:, None])


def sparse_attention_triton(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    block_map: BlockMap,
    summary: Summary | None = None,
    proj_bias_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel; with a summary (proj_l folded into it) and a bias the linear branch is added before rounding."""
    B, L, H, D = q_BLHD.shape
    out = torch.empty(B, L, H, D, dtype=q_BLHD.dtype, device=q_BLHD.device)
    num_q_blocks = num_blocks(L, block_map.block_q)
    linear = (out, out, out) if summary is None else (summary.kv, summary.phi_sum, proj_bias_D)
    with device_of(q_BLHD):
        # Two programs of 8 warps a multiprocessor beat one that spills nothing.
        sparse_attention_kernel[(num_q_blocks, B * H)](
            q_BLHD, k_BLHD, v_BLHD, block_map.indices, *linear, out,
            L, num_q_blocks, block_map.num_selected, DENOMINATOR_FLOOR / L, D**-0.5 * math.log2(math.e),
            *q_BLHD.stride()[:3], *k_BLHD.stride()[:3], *v_BLHD.stride()[:3], H,
            D=D, BLOCK_Q=block_map.block_q, BLOCK_K=block_map.block_k, LINEAR=summary is not None,
            num_warps=8 if block_map.block_q == 128 else 4, num_stages=2, enable_fp_fusion=FUSE_FMA,
            maxnreg=128 if is_hopper(q_BLHD.device) and block_map.block_q == 128 else None,
        )  # fmt: skip
    return out
