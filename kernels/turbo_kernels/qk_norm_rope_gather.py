"""`rms_norm_rope` and `gather` of queries and keys in one launch: they are not read again for what is gathered."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.fp8_linear import piece_warps
from turbo_kernels.gather import GROUP, SCALE_FLOOR, Gathered, log_sum_exp, store_int8
from turbo_kernels.providers import FUSE_FMA, device_of, is_hopper
from turbo_kernels.rms_norm_rope import check_norm_rope, norm_rotate

#: A thread's, so that enough programs share a multiprocessor.
_REGISTERS = 128


def qk_norm_rope_gather(
    q_BLD: torch.Tensor,
    k_BLD: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    rope: torch.Tensor,
    *,
    num_heads: int,
    eps: float,
    int8: bool,
) -> tuple[torch.Tensor, Gathered, torch.Tensor, Gathered]:
    """Queries, what is gathered of them (8-bit values where asked for), keys, what is gathered of those; by the kernel.

    Args:
        q_BLD, k_BLD: of one shape, dtype and strides, as slices of a joint projection are.
        q_weight_D, k_weight_D: of one dtype.

    Raises:
        ValueError: as `rms_norm_rope` of each; queries and keys that are not laid out alike.
    """
    projections = {"q": (q_BLD, q_weight_D), "k": (k_BLD, k_weight_D)}
    for name, (x, weight) in projections.items():
        check_norm_rope(name, x, weight, rope, num_heads)
    q_layout, k_layout = ((tuple(x.shape), x.stride(), x.dtype, weight.dtype) for x, weight in projections.values())
    if q_layout != k_layout:
        found = f"{q_layout} of q, {k_layout} of k"
        raise ValueError(f"shape, strides, dtype and the weight's dtype are {found}: must be alike")
    B, L, D = q_BLD.shape
    head_dim = D // num_heads
    q, k = (torch.empty(B, L, num_heads, head_dim, dtype=q_BLD.dtype, device=q_BLD.device) for _ in range(2))
    of_q, of_k = Gathered.empty(q, int8=int8), Gathered.empty(k, lse=True)
    q_sums, _, q8, q_scale = of_q.pointers
    head, tail = (heads * head_dim for heads in _head_pieces(num_heads))
    num_groups = of_q.sums.shape[1]
    with device_of(q_BLD):
        qk_norm_rope_gather_kernel[(num_groups, B, 2)](
            q_BLD, k_BLD, q_weight_D.contiguous(), k_weight_D.contiguous(), rope.contiguous(), q, k,
            of_k.sums, of_k.lse, q_sums, q8, q_scale, L, of_q.padded, D, num_heads, num_groups, eps, SCALE_FLOOR,
            *q_BLD.stride()[:2], HEAD=head, TAIL=tail, HEAD_DIM=head_dim, GROUP=GROUP, INT8=int8,
            num_warps=piece_warps(head), maxnreg=_REGISTERS if is_hopper(q_BLD.device) else None,
            enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return q, of_q, k, of_k


def _head_pieces(num_heads: int) -> tuple[int, int]:
    """Heads as two powers of two, the second one not always full."""
    head = max(triton.next_power_of_2(num_heads) // 2, 1)
    return head, triton.next_power_of_2(max(num_heads - head, 1))


@triton.jit
@no_type_check
def _rounded(b_x, dtype: tl.constexpr):
    """Values in fp32 that are those of `dtype`. bf16 by integers: conversion units are few."""
    if dtype == tl.bfloat16:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        return (b_bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        return b_x.to(dtype).to(tl.float32)


@triton.jit
@no_type_check
def _store_queries(
    b_x, i_b, i_l, padded, H, x8, scale, scale_floor, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr
):
    """A token's channels from FIRST on, fp32 [SIZE], in 8 bits."""
    o_h = FIRST // D + tl.arange(0, SIZE // D)
    b_heads = tl.reshape(b_x, [SIZE // D, D])
    store_int8(b_heads, (i_b * H + o_h) * padded + i_l, o_h < H, x8, scale, scale_floor, D)


@triton.jit
@no_type_check
def _store_keys(b_x, i_b, i_l, L, H, lse, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """lse of a token's channels from FIRST on, fp32 [SIZE]."""
    o_h = FIRST // D + tl.arange(0, SIZE // D)
    tl.store(lse + (i_b * H + o_h) * L + i_l, log_sum_exp(tl.reshape(b_x, [SIZE // D, D])), mask=o_h < H)


@triton.jit(do_not_specialize=["L", "padded", "num_groups"])
@no_type_check
def qk_norm_rope_gather_kernel(
    q,
    k,
    q_weight,  # [D]
    k_weight,  # [D]
    rope,  # [L, HEAD_DIM / 2, 2]
    q_out,  # [B, L, D] contiguous
    k_out,  # [B, L, D] contiguous
    k_sums,  # [BH, num_groups, HEAD_DIM]
    k_lse,  # [BH, L]
    q_sums,  # [BH, num_groups, HEAD_DIM]
    q8,  # [BH, padded, HEAD_DIM], INT8 only
    q_scale,  # [BH, padded], INT8 only
    L,
    padded,
    D,
    H,
    num_groups,
    eps,
    scale_floor,
    stride_b,
    stride_l,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
):
    queries = tl.program_id(2) == 0
    if queries:
        x, weight, out, sums = q, q_weight, q_out, q_sums
    else:
        x, weight, out, sums = k, k_weight, k_out, k_sums
    i_group = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, TAIL)
    in_1 = o_1 < D
    w_0 = tl.load(weight + o_0).to(tl.float32)
    w_1 = tl.load(weight + o_1, mask=in_1, other=0.0).to(tl.float32)
    sum_0 = tl.zeros([HEAD], dtype=tl.float32)
    sum_1 = tl.zeros([TAIL], dtype=tl.float32)
    first = i_group.to(tl.int64) * GROUP
    last = tl.minimum(first + GROUP, L)
    p_x = x + i_b * stride_b + first * stride_l
    next_0 = tl.load(p_x + o_0)
    next_1 = tl.load(p_x + o_1, mask=in_1, other=0.0)
    for i_l in range(first, last):
        b_0, b_1 = next_0.to(tl.float32), next_1.to(tl.float32)
        # The next token is on its way while this one is worked on.
        p_x += tl.where(i_l + 1 < last, stride_l, 0)
        next_0 = tl.load(p_x + o_0)
        next_1 = tl.load(p_x + o_1, mask=in_1, other=0.0)
        p_rope = rope + i_l * HEAD_DIM
        b_0, b_1 = norm_rotate(b_0, b_1, w_0, w_1, p_rope, o_0, o_1, D, eps, HEAD_DIM, HEAD, TAIL, True)
        p_out = out + (i_b * L + i_l) * D
        tl.store(p_out + o_0, b_0.to(out.dtype.element_ty))
        tl.store(p_out + o_1, b_1.to(out.dtype.element_ty), mask=in_1)
        sum_0 += b_0
        sum_1 += b_1
        if queries:
            if INT8:
                _store_queries(b_0, i_b, i_l, padded, H, q8, q_scale, scale_floor, 0, HEAD, HEAD_DIM)
                _store_queries(b_1, i_b, i_l, padded, H, q8, q_scale, scale_floor, HEAD, TAIL, HEAD_DIM)
        else:
            # phi is that of the rounded keys.
            b_0, b_1 = _rounded(b_0, out.dtype.element_ty), _rounded(b_1, out.dtype.element_ty)
            _store_keys(b_0, i_b, i_l, L, H, k_lse, 0, HEAD, HEAD_DIM)
            _store_keys(b_1, i_b, i_l, L, H, k_lse, HEAD, TAIL, HEAD_DIM)
    p_sums = sums + (i_b * H * num_groups + i_group) * HEAD_DIM
    tl.store(p_sums + (o_0 // HEAD_DIM) * num_groups * HEAD_DIM + o_0 % HEAD_DIM, sum_0)
    tl.store(p_sums + (o_1 // HEAD_DIM) * num_groups * HEAD_DIM + o_1 % HEAD_DIM, sum_1, mask=in_1)
