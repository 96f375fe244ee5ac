"""What later stages need to know about a whole sequence of keys and values, in one pass over both.

    k_mean    = mean_L(k)                      smoothing, for the block map and for int8 keys
    pooled_k  = mean of k over each key block  for the block map; both from the sums of `gather`
    v_scale   = amax_L(|v|) / V_MAX            one a (head, channel), for 8-bit values
    phi_sum   = mean_L(phi(k))                 phi = softmax over channels, in the input dtype, by the lse of `gather`
    kv        = mean_L(phi(k) v^T) [ W^T ]     [D, D]; with proj_l folded in where given
    out_bound = max_i (a_i + sum_j |W_ij| a_j + |b_i|), a = amax_L(|v|)
                                               no output of the head is larger: both branches average v

Means instead of sums keep kv inside fp16; the linear branch's 1e-5 is divided by L in turn. The sequence is cut into
chunks whose number of tokens follows from L and H, summed in order: neither batch size nor device changes a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.block_map import num_blocks
from turbo_kernels.gather import GROUP, LOG2_E, Gathered, pool_groups
from turbo_kernels.providers import FUSE_FMA, device_of, is_hopper

#: Tokens that a program may sum up; multiples of every block size.
_CHUNKS = range(256, 2048 + 1, 128)
#: Programs that a large GPU runs at a time, and what one costs beside its tokens, in tokens.
_SLOTS, _START = 264, 128
#: Largest e4m3 value: the range that values are scaled to, whether kept in e4m3 or in fp16.
V_MAX = 448.0
V_AMAX_FLOOR = 1e-20
_ROWS = 16
# Eight warps hold the [D, D] sum in half their registers, and two programs a multiprocessor hide each other's waits.
_TILE, _WARPS, _REGISTERS = 32, 8, 128
#: Columns of ones: the fewest that a product takes.
_ONES = tl.constexpr(16)  # type: ignore[no-untyped-call]
# 32 threads load 8 channels each, 16 bytes in bf16.
_CHANNELS_A_WARP = 256


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of keys and values, in the layout of the kernels: B and H flattened into one dimension BH.

    Attributes:
        k_mean: fp32 [BH, D].
        pooled_k: fp32 [BH, num_k_blocks, D], not smoothed.
        v_scale: fp32 [BH, D].
        phi_sum: fp32 [BH, D], None unless asked for.
        kv: [BH, D, D] in the input dtype, None unless asked for.
        out_bound: fp32 [BH], None unless proj_l is given.
    """

    k_mean: torch.Tensor
    pooled_k: torch.Tensor
    v_scale: torch.Tensor
    phi_sum: torch.Tensor | None
    kv: torch.Tensor | None
    out_bound: torch.Tensor | None


@triton.jit(do_not_specialize=["L", "num_chunks", "num_groups", "num_k_blocks", "chunk"])
@no_type_check
def summarize_chunk_kernel(
    k,  # LINEAR only
    v,
    k_groups,  # [BH, num_groups, D], sums
    k_lse,  # [BH, L], LINEAR only
    pooled_k,  # [BH, num_k_blocks, D]
    k_sums,  # [BH, num_chunks, D]
    v_amaxes,  # [BH, num_chunks, D]
    phi_sums,  # [BH, num_chunks, D]
    kv_sums,  # [BH, num_chunks, D, D]
    L,
    num_chunks,
    num_groups,
    num_k_blocks,
    chunk,  # tokens of a program
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # at least as many as a chunk has
    TILE: tl.constexpr,
    LANES: tl.constexpr,  # divides TILE
    LINEAR: tl.constexpr,
):
    i_chunk = tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    o_l = tl.arange(0, TILE)
    o_d = tl.arange(0, D)
    i_part = i_bh * num_chunks + i_chunk
    b_sum = pool_groups(
        k_groups, pooled_k, i_bh, i_chunk * chunk, (i_chunk + 1) * chunk, L, num_groups, num_k_blocks,
        D, BLOCK, GROUP, GROUPS,
    )  # fmt: skip
    tl.store(k_sums + i_part * D + o_d, b_sum)
    start = i_chunk.to(tl.int64) * chunk
    p_k = k + i_b * stride_kb + i_h * stride_kh + (start + o_l)[:, None] * stride_kl + o_d[None, :]
    p_v = v + i_b * stride_vb + i_h * stride_vh + (start + o_l)[:, None] * stride_vl + o_d[None, :]
    p_lse = k_lse + i_bh * L + start + o_l
    # Maxima stay split over LANES rows, as many as the threads span side by side: no thread needs another's values
    # before the end.
    b_v_amax = tl.zeros([LANES, D], dtype=tl.float32)
    # Every column is the sum: the tensor cores have time, the other units have none.
    b_phi_sum = tl.zeros([D, _ONES], dtype=tl.float32)
    b_ones = tl.full([TILE, _ONES], 1.0, dtype=k.dtype.element_ty)
    b_kv = tl.zeros([D, D], dtype=tl.float32)
    num_tokens = tl.minimum(chunk, L - i_chunk * chunk)
    for i in range(0, num_tokens, TILE):
        inside = i + o_l < num_tokens
        b_v = tl.load(p_v, mask=inside[:, None], other=0.0)  # [TILE, D]
        b_v_max = tl.max(tl.reshape(tl.abs(b_v), [TILE // LANES, LANES, D]), 0)
        b_v_amax = tl.maximum(b_v_amax, b_v_max.to(tl.float32))
        if LINEAR:
            b_k = tl.load(p_k, mask=inside[:, None], other=0.0)  # [TILE, D]
            b_lse = tl.load(p_lse, mask=inside, other=float("inf"))
            b_phi = tl.exp2(b_k.to(tl.float32) * LOG2_E - b_lse[:, None])
            b_phi = tl.trans(b_phi.to(k.dtype.element_ty))  # [D, TILE]
            b_phi_sum = tl.dot(b_phi, b_ones, b_phi_sum, input_precision="ieee")
            b_kv = tl.dot(b_phi, b_v, b_kv, input_precision="ieee")
        p_k += TILE * stride_kl
        p_v += TILE * stride_vl
        p_lse += TILE
    tl.store(v_amaxes + i_part * D + o_d, tl.max(b_v_amax, 0))
    if LINEAR:
        tl.store(phi_sums + i_part * D + o_d, tl.max(b_phi_sum, 1))
        tl.store(kv_sums + i_part * D * D + o_d[:, None] * D + o_d[None, :], b_kv)


@triton.jit(do_not_specialize=["L", "num_chunks", "v_max"])
@no_type_check
def reduce_chunks_kernel(
    k_sums,
    v_amaxes,
    phi_sums,
    kv_sums,
    k_mean,  # [BH, D]
    v_scale,  # [BH, D]
    phi_sum,  # [BH, D]
    kv,  # [BH, D, D]
    out_bound,  # [BH], PROJECT only
    proj_weight,  # [D, D], PROJECT only
    proj_bias,  # [D], PROJECT only
    L,
    num_chunks,
    v_max,
    v_amax_floor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    LINEAR: tl.constexpr,
    PROJECT: tl.constexpr,
):
    i_rows = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D)
    o_r = i_rows * ROWS + tl.arange(0, ROWS)
    if i_rows == 0:
        b_k_sum = tl.zeros([D], dtype=tl.float32)
        b_v_amax = tl.zeros([D], dtype=tl.float32)
        b_phi_sum = tl.zeros([D], dtype=tl.float32)
        for i in tl.range(num_chunks, loop_unroll_factor=4):
            o_part = (i_bh * num_chunks + i) * D + o_d
            b_k_sum += tl.load(k_sums + o_part)
            b_v_amax = tl.maximum(b_v_amax, tl.load(v_amaxes + o_part))
            if LINEAR:
                b_phi_sum += tl.load(phi_sums + o_part)
        tl.store(k_mean + i_bh * D + o_d, b_k_sum / L)
        b_v_amax = tl.maximum(b_v_amax, v_amax_floor)
        tl.store(v_scale + i_bh * D + o_d, b_v_amax * (1.0 / v_max))
        if PROJECT:
            b_weight = tl.load(proj_weight + o_d[:, None] * D + o_d[None, :]).to(tl.float32)  # [out, in]
            b_bound = tl.sum(tl.abs(b_weight) * b_v_amax[None, :], 1)
            b_bound += b_v_amax + tl.abs(tl.load(proj_bias + o_d).to(tl.float32))
            tl.store(out_bound + i_bh, tl.max(b_bound, 0))
        if LINEAR:
            tl.store(phi_sum + i_bh * D + o_d, b_phi_sum / L)
    if LINEAR:
        b_kv = tl.zeros([ROWS, D], dtype=tl.float32)
        p_kv = kv_sums + i_bh * num_chunks * D * D + o_r[:, None] * D + o_d[None, :]
        for _ in tl.range(num_chunks, loop_unroll_factor=8):
            b_kv += tl.load(p_kv)
            p_kv += D * D
        b_kv = b_kv / L
        if PROJECT:
            b_weight = tl.load(proj_weight + o_d[:, None] * D + o_d[None, :]).to(tl.float32)  # [out, in]
            b_kv = tl.dot(b_kv, tl.trans(b_weight), input_precision="tf32x3")
        tl.store(kv + i_bh * D * D + o_r[:, None] * D + o_d[None, :], b_kv.to(kv.dtype.element_ty))


@triton.jit
@no_type_check
def linear_branch(b_q, inside, b_kv, phi_sum, i_bh, floor, D: tl.constexpr):
    """phi(q) kv / (floor + phi(q) phi_sum) of one tile of queries, fp32 [BLOCK, D]; b_kv is [D, D]."""
    o_d = tl.arange(0, D)
    b_logits = b_q.to(tl.float32) * LOG2_E
    b_exp = tl.exp2(b_logits - tl.max(b_logits, 1)[:, None])
    # A division costs ten products: one a row.
    b_phi = b_exp * tl.where(inside, 1.0 / tl.sum(b_exp, 1), 0.0)[:, None]
    b_phi_sum = tl.load(phi_sum + i_bh * D + o_d)
    b_denominator = floor + tl.sum(b_phi * b_phi_sum[None, :], 1)
    return tl.dot(b_phi.to(b_kv.dtype), b_kv, input_precision="ieee") * (1.0 / b_denominator)[:, None]


def chunk_tokens(L: int, H: int) -> int:
    """Tokens a program sums up: what leaves the fewest programs waiting for others. The same on every device."""
    return min(_CHUNKS, key=lambda chunk: (triton.cdiv(triton.cdiv(L, chunk) * H, _SLOTS) * (chunk + _START), -chunk))


def summarize(
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    of_keys: Gathered,
    *,
    block_k: int,
    linear: bool,
    proj_l: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Summary:
    """Run both kernels over keys and values of equal shape.

    Args:
        of_keys: what `gather` found, with lse where `linear`.
        linear: asks for phi_sum and kv.
        proj_l: its weight [D, D], contiguous, and bias [D]: with `linear`, asks for kv with the weight folded in and
            for out_bound.
    """
    B, L, H, D = k_BLHD.shape
    device = k_BLHD.device
    chunk = chunk_tokens(L, H)
    num_chunks, num_k_blocks = triton.cdiv(L, chunk), num_blocks(L, block_k)
    k_groups, k_lse, *_ = of_keys.pointers
    pooled_k = torch.empty(B * H, num_k_blocks, D, dtype=torch.float32, device=device)
    k_sums = torch.empty(B * H, num_chunks, D, dtype=torch.float32, device=device)
    v_amaxes = torch.empty_like(k_sums)
    phi_sums = torch.empty_like(k_sums) if linear else k_sums
    kv_sums = torch.empty(B * H, num_chunks, D, D, dtype=torch.float32, device=device) if linear else k_sums
    k_mean = torch.empty(B * H, D, dtype=torch.float32, device=device)
    v_scale = torch.empty_like(k_mean)
    phi_sum = torch.empty_like(k_mean) if linear else None
    kv = torch.empty(B * H, D, D, dtype=k_BLHD.dtype, device=device) if linear else None
    out_bound = torch.empty(B * H, dtype=torch.float32, device=device) if proj_l is not None else None
    with device_of(k_BLHD):
        summarize_chunk_kernel[(num_chunks, B * H)](
            k_BLHD, v_BLHD, k_groups, k_lse, pooled_k, k_sums, v_amaxes, phi_sums, kv_sums,
            L, num_chunks, k_groups.shape[1], num_k_blocks, chunk, *k_BLHD.stride()[:3], *v_BLHD.stride()[:3], H,
            D=D, BLOCK=block_k, GROUP=GROUP, GROUPS=triton.next_power_of_2(_CHUNKS[-1] // GROUP), TILE=_TILE,
            LANES=_WARPS * _CHANNELS_A_WARP // D, LINEAR=linear,
            num_warps=_WARPS, num_stages=2, maxnreg=_REGISTERS if is_hopper(device) else None,
            enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
        reduce_chunks_kernel[(D // _ROWS if linear else 1, B * H)](
            k_sums, v_amaxes, phi_sums, kv_sums, k_mean, v_scale,
            k_mean if phi_sum is None else phi_sum, k_mean if kv is None else kv,
            k_mean if out_bound is None else out_bound, *((k_mean, k_mean) if proj_l is None else proj_l),
            L, num_chunks, V_MAX, V_AMAX_FLOOR,
            D=D, ROWS=_ROWS, LINEAR=linear, PROJECT=proj_l is not None,
            num_warps=4, num_stages=2, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return Summary(k_mean, pooled_k, v_scale, phi_sum, kv, out_bound)
