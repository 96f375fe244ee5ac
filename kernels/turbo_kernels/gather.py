"""What later stages need to know of queries or keys, token by token or summed over a few: one pass over them.

    sums  = sum of x over each group of 64 tokens        for the block map and the mean of keys
    lse   = log2(sum over channels of exp(x))            of keys: phi(x) = softmax(x) = exp2(x log2(e) - lse)
    x8    = round(x * (1 / s)), s = amax/127 + 1e-7      of queries, for `sagesla`: int8, a scale a token

A token is rounded to 8 bits by its own largest value. Upstream takes one scale a query block: a scale a token is
closer and needs no other token; the attention kernel takes 1 % longer for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.providers import device_of

#: Tokens of a group; divides every block size.
GROUP = 64
#: The largest block of queries: 8-bit rows are padded to whole ones, so that they are read without a mask.
_PADDING = 128
LOG2_E = tl.constexpr(math.log2(math.e))  # type: ignore[no-untyped-call]
SCALE_FLOOR = 1e-7
#: 1.5 * 2^23: added to a small value, it leaves the nearest integer in the lowest bits, without a conversion.
SHIFT = tl.constexpr(12582912.0)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Facts about [B, L, H, D], of which the last three are None unless asked for.

    Attributes:
        sums: fp32 [B * H, num_groups, D].
        lse: fp32 [B * H, L].
        int8: [B * H, padded, D], L or more rows, the last of them arbitrary.
        scale: fp32 [B * H, padded], of int8.
    """

    sums: torch.Tensor
    lse: torch.Tensor | None
    int8: torch.Tensor | None
    scale: torch.Tensor | None

    @classmethod
    def empty(cls, x_BLHD: torch.Tensor, *, lse: bool = False, int8: bool = False) -> Gathered:
        """Room for a kernel to write to."""
        B, L, H, D = x_BLHD.shape
        device = x_BLHD.device
        padded = triton.cdiv(L, _PADDING) * _PADDING
        return cls(
            sums=torch.empty(B * H, triton.cdiv(L, GROUP), D, dtype=torch.float32, device=device),
            lse=torch.empty(B * H, L, dtype=torch.float32, device=device) if lse else None,
            int8=torch.empty(B * H, padded, D, dtype=torch.int8, device=device) if int8 else None,
            scale=torch.empty(B * H, padded, dtype=torch.float32, device=device) if int8 else None,
        )

    @property
    def padded(self) -> int:
        """Rows of int8, 0 where there is none."""
        return 0 if self.int8 is None else self.int8.shape[1]

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """All four, as kernels take them: where there is none, any."""
        return self.sums, *(self.sums if part is None else part for part in (self.lse, self.int8, self.scale))


@triton.jit
@no_type_check
def round_int8(b_x):
    """The nearest integers, halves to even; |x| < 2^21."""
    return (b_x + SHIFT).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
@no_type_check
def log_sum_exp(b_x):
    """log2 of the sum of exp over each row of fp32 [ROWS, D]."""
    b_max = tl.max(b_x, 1) * LOG2_E
    return b_max + tl.log2(tl.sum(tl.exp2(b_x * LOG2_E - b_max[:, None]), 1))


@triton.jit
@no_type_check
def store_int8(b_x, o_row, inside, x8, scale, scale_floor, D: tl.constexpr):
    """fp32 [ROWS, D] in 8 bits, to the rows o_row, with their scales."""
    b_scale = tl.max(tl.abs(b_x), 1) * (1.0 / 127.0) + scale_floor
    b_x8 = round_int8(b_x * tl.div_rn(1.0, b_scale)[:, None])
    tl.store(scale + o_row, b_scale, mask=inside)
    tl.store(x8 + o_row[:, None] * D + tl.arange(0, D)[None, :], b_x8, mask=inside[:, None])


@triton.jit(do_not_specialize=["L", "padded", "num_groups"])
@no_type_check
def gather_kernel(
    x,
    sums,  # [BH, num_groups, D]
    lse,  # [BH, L], LSE only
    x8,  # [BH, padded, D], INT8 only
    scale,  # [BH, padded], INT8 only
    L,
    padded,
    num_groups,
    scale_floor,
    stride_b,
    stride_l,
    stride_h,
    H,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    LSE: tl.constexpr,
    INT8: tl.constexpr,
):
    i_group = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_d = tl.arange(0, D)
    o_l = (i_group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    inside = o_l < L
    p_x = x + i_b * stride_b + i_h * stride_h + o_l[:, None] * stride_l + o_d[None, :]
    b_x = tl.load(p_x, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(sums + (i_bh * num_groups + i_group) * D + o_d, tl.sum(b_x, 0))
    if LSE:
        tl.store(lse + i_bh * L + o_l, log_sum_exp(b_x), mask=inside)
    if INT8:
        store_int8(b_x, i_bh * padded + o_l, inside, x8, scale, scale_floor, D)


@triton.jit
@no_type_check
def pool_groups(
    sums, pooled, i_bh, first, last, L, num_groups, num_blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the means of the blocks of tokens first to last, of at most GROUPS groups; returns their sum, fp32 [D]."""
    BLOCKS: tl.constexpr = GROUPS * GROUP // BLOCK
    o_d = tl.arange(0, D)
    o_g = first // GROUP + tl.arange(0, GROUPS)
    real = (o_g < num_groups) & (o_g < last // GROUP)
    p_sums = sums + (i_bh * num_groups + o_g)[:, None] * D + o_d[None, :]
    b_sums = tl.load(p_sums, mask=real[:, None], other=0.0)
    o_block = first // BLOCK + tl.arange(0, BLOCKS)
    real = (o_block < num_blocks) & (o_block < last // BLOCK)
    b_count = tl.maximum(tl.minimum(BLOCK, L - o_block * BLOCK), 1).to(tl.float32)
    b_means = tl.sum(tl.reshape(b_sums, [BLOCKS, BLOCK // GROUP, D]), 1) / b_count[:, None]
    tl.store(pooled + (i_bh * num_blocks + o_block)[:, None] * D + o_d[None, :], b_means, mask=real[:, None])
    return tl.sum(b_sums, 0)


def gather(x_BLHD: torch.Tensor, *, lse: bool = False, int8: bool = False) -> Gathered:
    """Of queries or keys that are ready, of any strides with the last dimension contiguous."""
    B, L, H, D = x_BLHD.shape
    gathered = Gathered.empty(x_BLHD, lse=lse, int8=int8)
    num_groups = gathered.sums.shape[1]
    with device_of(x_BLHD):
        # No contraction into FMA where a value is rounded to 8 bits: the reference has none.
        gather_kernel[(num_groups, B * H)](
            x_BLHD, *gathered.pointers, L, gathered.padded, num_groups, SCALE_FLOOR, *x_BLHD.stride()[:3], H,
            D=D, GROUP=GROUP, LSE=lse, INT8=int8, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return gathered
