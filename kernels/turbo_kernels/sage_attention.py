"""Block-sparse attention with 8-bit products: the sparse branch of `sagesla`.

    k~      = k - mean_L(k)                                    softmax does not see the difference
    q8, k8  = round(x * (1 / s)), s = amax/127 + 1e-7          int8, a scale a (head, token) of q, a (head, block) of k
    S       = (q8 k8^T)_int32 * s_q s_k / sqrt(D)
    P       = exp(S - running row max)                         kept as P * P_MAX in the 8-bit (or 16-bit) format
    v8      = v * (1 / s_v), s_v = amax_L(|v|) / V_MAX               one scale a (head, channel)
    o       = s_v * sum(P v8) / sum(P)                         denominator from the unrounded P

P and v8 are e4m3 where the tensor cores multiply it (compute capability 8.9 and later), fp16 elsewhere. V_MAX is 448,
the largest e4m3 value, where upstream takes 2.25 so that sums in fp16 cannot overflow: these sums are fp32, and the
wider range keeps values below amax/144 out of the subnormals.
Source: SageAttention2, SLA paper, upstream TurboDiffusion (sagesla).
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.block_map import BlockMap, check_block_map, num_blocks
from turbo_kernels.checks import check_attention_inputs
from turbo_kernels.fp8_linear import AMAX_FLOOR, FP8_MAX
from turbo_kernels.gather import SCALE_FLOOR, SHIFT, Gathered, gather, round_int8
from turbo_kernels.linear_attention import DENOMINATOR_FLOOR
from turbo_kernels.providers import (
    FUSE_FMA,
    INTERPRETED,
    device_of,
    has_fp8,
    has_tile_descriptors,
    is_hopper,
    resolve_provider,
    tile_descriptors,
)
from turbo_kernels.spargeattn import sage_attention_spargeattn
from turbo_kernels.sparse_attention import split_blocks
from turbo_kernels.summary import V_AMAX_FLOOR, V_MAX, Summary, linear_branch, summarize

#: P reaches 1 and e4m3 448: scaled so, it keeps the most of its bits.
P_MAX_FP8 = 448.0
#: The bits of SHIFT. An integer S of less than 2^22 added to them makes them those of SHIFT + S.
SHIFT_BITS = tl.constexpr(0x4B400000)  # type: ignore[no-untyped-call]
MINUS_INFINITY_BITS = tl.constexpr(-0x00800000)  # type: ignore[no-untyped-call]
#: The interpreter rounds between a product and its sum.
FUSED = tl.constexpr(not INTERPRETED)  # type: ignore[no-untyped-call]


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
    if provider == "triton":
        summary = summarize(k_BLHD, v_BLHD, gather(k_BLHD), block_k=block_map.block_k, linear=False)
        return sage_attention_triton(q_BLHD, k_BLHD, v_BLHD, block_map, gather(q_BLHD, int8=True), summary)
    if provider == "spargeattn":
        return sage_attention_spargeattn(q_BLHD, k_BLHD, v_BLHD, block_map)
    return sage_attention_reference(q_BLHD, k_BLHD, v_BLHD, block_map).to(q_BLHD.dtype)


def quantize_int8_reference(x: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale for all of `dim`, halves to even; values stay in fp32 for exact products."""
    scale = x.abs().amax(dim=dim, keepdim=True) * (1.0 / 127.0) + SCALE_FLOOR
    return torch.round(x * (1.0 / scale)), scale


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
            q8, q_scale = quantize_int8_reference(split_blocks(q_BLHD[b, :, h], block_map.block_q), -1)
            k8, k_scale = quantize_int8_reference(split_blocks(k_LD - k_LD.mean(0), block_map.block_k), (1, 2))
            v_scale = v_LD.abs().amax(0).clamp_min(V_AMAX_FLOOR) * (1.0 / V_MAX)
            v8 = split_blocks((v_LD * (1.0 / v_scale)).to(pv_dtype), block_map.block_k)

            row_max = torch.full((*q8.shape[:2], 1), float("-inf"), device=device)
            row_sum = torch.zeros_like(row_max)
            out = torch.zeros_like(q8)
            for i in range(block_map.num_selected):
                chosen = indices[:, i]
                keys = chosen[:, None] * block_map.block_k + offsets
                scores = (q8 @ k8[chosen].transpose(1, 2)) * (q_scale * to_log2 * k_scale[chosen])
                scores = scores.masked_fill(keys[:, None] >= L, float("-inf"))
                new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
                weights = torch.exp2(scores - new_max + log2_p_max)
                shrink = torch.exp2(row_max - new_max)
                row_sum = row_sum * shrink + weights.sum(-1, keepdim=True)
                out = out * shrink + weights.to(pv_dtype).float() @ v8[chosen]
                row_max = new_max
            out_BLHD[b, :, h] = (out / row_sum * v_scale).flatten(0, 1)[:L]
    return out_BLHD


@triton.jit
@no_type_check
def quantize_tile(b_x, scale_floor):
    """int8 values and scale of one tile."""
    scale = tl.max(tl.max(tl.abs(b_x), 1), 0) * (1.0 / 127.0) + scale_floor
    return round_int8(b_x * tl.div_rn(1.0, scale)), scale


@triton.jit(do_not_specialize=["L", "num_blocks"])
@no_type_check
def quantize_keys_values_kernel(
    k,
    v,
    k_mean,  # [BH, D]
    v_scale,  # [BH, D]
    k8,  # [BH, num_blocks, BLOCK, D]
    k_scale,  # [BH, num_blocks]
    v8,  # [BH, num_blocks, D, BLOCK]: keys contiguous, as 8-bit tensor-core operands need them
    L,
    num_blocks,
    scale_floor,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_row = i_bh * num_blocks + i_block
    o_r = tl.arange(0, BLOCK)
    o_d = tl.arange(0, D)
    o_l = (i_block * BLOCK + o_r).to(tl.int64)
    inside = (o_l < L)[:, None]
    p_k = k + i_b * stride_kb + i_h * stride_kh + o_l[:, None] * stride_kl + o_d[None, :]
    p_v = v + i_b * stride_vb + i_h * stride_vh + o_l[:, None] * stride_vl + o_d[None, :]
    b_k = tl.load(p_k, mask=inside, other=0.0).to(tl.float32)
    b_v = tl.load(p_v, mask=inside, other=0.0).to(tl.float32)
    b_k = tl.where(inside, b_k - tl.load(k_mean + i_bh * D + o_d)[None, :], 0.0)
    b_k8, scale = quantize_tile(b_k, scale_floor)
    tl.store(k8 + (i_row * BLOCK + o_r)[:, None] * D + o_d[None, :], b_k8)
    tl.store(k_scale + i_row, scale)
    b_v8 = (b_v * tl.div_rn(1.0, tl.load(v_scale + i_bh * D + o_d))[None, :]).to(v8.dtype.element_ty)
    tl.store(v8 + i_row * BLOCK * D + o_d[:, None] * BLOCK + o_r[None, :], tl.trans(b_v8))


@triton.jit
@no_type_check
def _attend(
    b_q8, k8, v8, i_tile, num_keys, row_max, row_sum, acc, scale, log2_p_max,
    D: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys, all or the first num_keys of them, into the running softmax."""
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, D)
    if DESCRIPTORS:
        b_k8 = k8.load([i_tile * BLOCK_K, 0])  # [BLOCK_K, D]
    else:
        b_k8 = tl.load(k8 + i_tile.to(tl.int64) * (BLOCK_K * D) + o_k[:, None] * D + o_d[None, :])
    # The sums start at SHIFT_BITS: read as fp32 they are SHIFT + S, without a conversion.
    b_bits = tl.full([b_q8.shape[0], BLOCK_K], SHIFT_BITS, dtype=tl.int32)
    b_bits = tl.dot(b_q8, tl.trans(b_k8), b_bits, out_dtype=tl.int32)  # [BLOCK_Q, BLOCK_K]
    if num_keys < BLOCK_K:
        b_bits = tl.where((o_k < num_keys)[None, :], b_bits, MINUS_INFINITY_BITS)
    b_shifted = b_bits.to(tl.float32, bitcast=True)
    tile_max = (tl.max(b_bits, 1) - SHIFT_BITS).to(tl.float32)
    if FUSED:
        # p = exp2((SHIFT + S) * scale - offset) with one FMA. SHIFT * scale is exact, as scale keeps 22 bits, and the
        # row maximum, which need only be near the true one, moves to where its sum with that, offset, is exact too.
        scale = (scale.to(tl.int32, bitcast=True) & -4).to(tl.float32, bitcast=True)
        shift = SHIFT * scale
        offset = shift + (tl.maximum(row_max, tile_max * scale) - log2_p_max)
        new_max = (offset - shift) + log2_p_max
        b_scale = tl.broadcast_to(scale[:, None], b_shifted.shape)
        b_s = tl.fma(b_shifted, b_scale, tl.broadcast_to(-offset[:, None], b_shifted.shape))
    else:
        new_max = tl.maximum(row_max, tile_max * scale)
        b_s = (b_shifted - SHIFT) * scale[:, None] - (new_max - log2_p_max)[:, None]
    b_p = tl.exp2(b_s)
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(b_p, 1)
    if DESCRIPTORS:
        b_v8 = v8.load([i_tile * D, 0])  # [D, BLOCK_K]
    else:
        b_v8 = tl.load(v8 + i_tile.to(tl.int64) * (BLOCK_K * D) + o_d[:, None] * BLOCK_K + o_k[None, :])
    # Added outside of the product: Hopper's fp8 units keep about 14 bits while they sum. It is also the faster way.
    acc = acc * shrink[:, None] + tl.dot(b_p.to(b_v8.dtype), tl.trans(b_v8))
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["L", "padded", "num_q_blocks", "num_k_blocks", "num_selected", "floor", "log2_p_max"])
@no_type_check
def sage_attention_kernel(
    q,  # [B, L, H, D], LINEAR only
    q8,  # [BH, padded, D]
    q_scale,  # [BH, padded]
    k8,  # [BH * num_k_blocks * BLOCK_K, D]: pointer, or descriptor of [BLOCK_K, D] tiles
    k_scale,  # [BH * num_k_blocks]
    v8,  # [BH * num_k_blocks * D, BLOCK_K]: pointer, or descriptor of [D, BLOCK_K] tiles
    v_scale,  # [BH, D]
    indices,  # [BH, num_q_blocks, num_selected]
    kv,  # [BH * D, D]: pointer, or descriptor of [D, D] tiles; LINEAR only
    phi_sum,  # [BH, D], LINEAR only
    proj_bias,  # [D], LINEAR only
    out,  # [B, L, H, D] contiguous
    out_bound,  # [BH], QUANTIZE only
    out_scale,  # [B, L], QUANTIZE only
    L,
    padded,
    num_q_blocks,
    num_k_blocks,
    num_selected,
    floor,
    scale,
    log2_p_max,
    amax_floor,
    fp8_max,
    stride_qb,
    stride_ql,
    stride_qh,
    H,
    HEADS: tl.constexpr,  # H, or the next power of two
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINEAR: tl.constexpr,
    QUANTIZE: tl.constexpr,  # with LINEAR only
    DESCRIPTORS: tl.constexpr,
    AHEAD: tl.constexpr,  # load each index an iteration before its tiles
):
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_r = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, D)
    o_row = i_bh * padded + i_q * BLOCK_Q + o_r
    b_q8 = tl.load(q8 + o_row[:, None] * D + o_d[None, :])
    b_q_scale = tl.load(q_scale + o_row, mask=i_q * BLOCK_Q + o_r < L, other=1.0) * scale
    first_tile = tl.program_id(1) * num_k_blocks
    p_index = indices + (i_bh * num_q_blocks + i_q) * num_selected
    row_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    # Ascending indices: only the last one can be the ragged block.
    i_block = tl.load(p_index)
    for i in range(num_selected):
        if AHEAD:
            i_next = tl.load(p_index + tl.minimum(i + 1, num_selected - 1))
        else:
            i_block = tl.load(p_index + i)
        b_scale = b_q_scale * tl.load(k_scale + first_tile + i_block)
        row_max, row_sum, acc = _attend(
            b_q8, k8, v8, first_tile + i_block, L - i_block * BLOCK_K, row_max, row_sum, acc, b_scale, log2_p_max,
            D, BLOCK_K, DESCRIPTORS,
        )  # fmt: skip
        if AHEAD:
            i_block = i_next
    acc = acc * (1.0 / row_sum)[:, None] * tl.load(v_scale + i_bh * D + o_d)[None, :]
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_l = (i_q * BLOCK_Q + o_r).to(tl.int64)
    inside = o_l < L
    if LINEAR:
        p_q = q + i_b * stride_qb + i_h * stride_qh + o_l[:, None] * stride_ql + o_d[None, :]
        b_q = tl.load(p_q, mask=inside[:, None], other=0.0)
        if DESCRIPTORS:
            b_kv = kv.load([(i_bh * D).to(tl.int32), 0])
        else:
            b_kv = tl.load(kv + i_bh * D * D + o_d[:, None] * D + o_d[None, :])
        b_linear = linear_branch(b_q, inside, b_kv, phi_sum, i_bh, floor, D)
        acc += b_linear + tl.load(proj_bias + o_d).to(tl.float32)[None, :]
    if QUANTIZE:
        # One scale a sample, from bounds that are known: no head waits for another's largest value.
        o_h = tl.arange(0, HEADS)
        bound = tl.max(tl.load(out_bound + i_b * H + o_h, mask=o_h < H, other=0.0), 0)
        row_scale = tl.maximum(bound, amax_floor) * (1.0 / fp8_max)
        acc = tl.minimum(tl.maximum(acc * (1.0 / row_scale), -fp8_max), fp8_max)
        if i_h == 0:
            tl.store(out_scale + i_b * L + o_l, tl.broadcast_to(row_scale, [BLOCK_Q]), mask=inside)
    p_out = out + ((i_b * L + o_l)[:, None] * H + i_h) * D + o_d[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=inside[:, None])


def sage_attention_triton(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    block_map: BlockMap,
    of_queries: Gathered,
    summary: Summary,
    proj_bias_D: torch.Tensor | None = None,
    out_scale_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantise keys and values, then attend; [B, L, H, D].

    Args:
        of_queries: with 8-bit values.
        proj_bias_D: proj_l's bias (its weight folded into summary.kv): the linear branch is added before rounding.
        out_scale_BL: fp32, with proj_bias_D alone: asks for the output in e4m3, and is filled with its scales.
    """
    B, L, H, D = q_BLHD.shape
    device = q_BLHD.device
    block_q, block_k = block_map.block_q, block_map.block_k
    num_q_blocks, num_k_blocks = num_blocks(L, block_q), num_blocks(L, block_k)
    fp8, descriptors = has_fp8(device), has_tile_descriptors(device)
    k8 = torch.empty(B * H, num_k_blocks, block_k, D, dtype=torch.int8, device=device)
    k_scale = torch.empty(B * H, num_k_blocks, dtype=torch.float32, device=device)
    v_dtype = torch.float8_e4m3fn if fp8 else torch.float16
    v8 = torch.empty(B * H, num_k_blocks, D, block_k, dtype=v_dtype, device=device)
    quantize = out_scale_BL is not None
    out = torch.empty(B, L, H, D, dtype=torch.float8_e4m3fn if quantize else q_BLHD.dtype, device=device)
    rounding = (summary.out_bound, out_scale_BL) if quantize else (out, out)
    linear: tuple[Any, ...] = (out, out, out)
    if proj_bias_D is not None and summary.kv is not None:
        linear = (tile_descriptors(summary.kv) if descriptors else summary.kv, summary.phi_sum, proj_bias_D)
    with device_of(q_BLHD):
        quantize_keys_values_kernel[(num_k_blocks, B * H)](
            k_BLHD, v_BLHD, summary.k_mean, summary.v_scale, k8, k_scale, v8, L, num_k_blocks, SCALE_FLOOR,
            *k_BLHD.stride()[:3], *v_BLHD.stride()[:3], H,
            D=D, BLOCK=block_k, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        keys, values = (tile_descriptors(k8), tile_descriptors(v8)) if descriptors else (k8, v8)
        sage_attention_kernel[(num_q_blocks, B * H)](
            q_BLHD, of_queries.int8, of_queries.scale, keys, k_scale, values, summary.v_scale,
            block_map.indices, *linear, out, *rounding,
            L, of_queries.padded, num_q_blocks, num_k_blocks, block_map.num_selected,
            DENOMINATOR_FLOOR / L, D**-0.5 * math.log2(math.e), math.log2(P_MAX_FP8) if fp8 else 0.0,
            AMAX_FLOOR, FP8_MAX, *q_BLHD.stride()[:3], H, HEADS=triton.next_power_of_2(H),
            D=D, BLOCK_Q=block_q, BLOCK_K=block_k, LINEAR=proj_bias_D is not None, QUANTIZE=quantize,
            DESCRIPTORS=descriptors,
            AHEAD=is_hopper(device),  # triton 3.9 cannot pipeline a carried index for Blackwell
            num_warps=4 if block_q == 64 else 8, num_stages=3 if block_q == 64 else 2, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return out
