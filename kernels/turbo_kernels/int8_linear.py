"""Linear layer of 8-bit weights and activations (W8A8) with one scale for each 128 x 128 block.

    amax  = max(1e-8, max|x|) over the block
    x8    = saturate(round_half_even(x * 128 / amax)), scale = amax / 128        (+amax becomes 127, -amax -128)
    y     = sum over K blocks of a_scale * w_scale * (a8 w8^T)_int32  + bias

Activations are quantised a sample at a time, so that no block straddles two samples of a batch (upstream flattens
the batch, which makes a request's result depend on its neighbours). Source: upstream TurboDiffusion (quant_linear).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.block_map import num_blocks
from turbo_kernels.checks import check_float
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

BLOCK = 128
AMAX_FLOOR = 1e-8


def quantize_int8_blockwise(x_MK: torch.Tensor, *, provider: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix; returns int8 [M, K] and fp32 scales [ceil(M / 128), ceil(K / 128)].

    Raises:
        ValueError: not a floating-point matrix, or a provider that cannot run here.
    """
    check_float("x", x_MK)
    if x_MK.ndim != 2 or 0 in x_MK.shape:
        raise ValueError(f"x has shape {tuple(x_MK.shape)}: must be [M, K], not empty")
    provider = resolve_provider(provider, x_MK.device, op="quantize_int8_blockwise")
    if provider == "triton":
        x8_BMK, scale = _quantize_triton(x_MK[None])
        return x8_BMK[0], scale[0]
    return _quantize_reference(x_MK)


def int8_linear(
    x_BLK: torch.Tensor,
    int8_weight_NK: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_N: torch.Tensor | None,
    *,
    provider: str | None = None,
) -> torch.Tensor:
    """Quantise x by sample, multiply in int8, rescale and add the bias in fp32; returns [B, L, N] in x's dtype.

    Args:
        x_BLK: [B, L, K].
        int8_weight_NK: int8 [N, K].
        weight_scale: fp32 [ceil(N / 128), ceil(K / 128)].
        bias_N: [N] or None.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    check_float("x", x_BLK)
    if x_BLK.ndim != 3 or 0 in x_BLK.shape:
        raise ValueError(f"x has shape {tuple(x_BLK.shape)}: must be [B, L, K], not empty")
    K = x_BLK.shape[-1]
    if int8_weight_NK.dtype != torch.int8 or int8_weight_NK.ndim != 2 or int8_weight_NK.shape[1] != K:
        raise ValueError(f"weight is {int8_weight_NK.dtype} {tuple(int8_weight_NK.shape)}: must be torch.int8 [N, {K}]")
    N = int8_weight_NK.shape[0]
    scale_shape = (num_blocks(N, BLOCK), num_blocks(K, BLOCK))
    if weight_scale.dtype != torch.float32 or tuple(weight_scale.shape) != scale_shape:
        raise ValueError(
            f"weight_scale is {weight_scale.dtype} {tuple(weight_scale.shape)}: must be torch.float32 {scale_shape}"
        )
    if bias_N is not None and (bias_N.shape != (N,) or not bias_N.is_floating_point()):
        raise ValueError(f"bias is {bias_N.dtype} {tuple(bias_N.shape)}: must be floating-point {(N,)}")
    for name, tensor in (("weight", int8_weight_NK), ("weight_scale", weight_scale), ("bias", bias_N)):
        if tensor is not None and tensor.device != x_BLK.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x_BLK.device}")
    provider = resolve_provider(provider, x_BLK.device, op="int8_linear")
    if provider == "triton":
        return _int8_linear_triton(x_BLK, int8_weight_NK, weight_scale, bias_N)
    weight = dequantize_int8_blockwise(int8_weight_NK, weight_scale)
    bias = None if bias_N is None else bias_N.float()
    samples = [dequantize_int8_blockwise(*_quantize_reference(x_LK)) for x_LK in x_BLK]
    return torch.stack([F.linear(sample, weight, bias) for sample in samples]).to(x_BLK.dtype)


def dequantize_int8_blockwise(x8_MK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 x8 * scale, each scale spread over its 128 x 128 block."""
    M, K = x8_MK.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:M].repeat_interleave(BLOCK, 1)[:, :K]
    return x8_MK.float() * spread


def _quantize_reference(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = x_MK.shape
    rows, columns = num_blocks(M, BLOCK), num_blocks(K, BLOCK)
    x = F.pad(x_MK.float(), (0, columns * BLOCK - K, 0, rows * BLOCK - M)).view(rows, BLOCK, columns, BLOCK)
    amax = x.abs().amax(dim=(1, 3), keepdim=True).clamp_min(AMAX_FLOOR)
    x8 = torch.round(x * (128.0 / amax)).clamp(-128, 127).to(torch.int8)
    return x8.view(rows * BLOCK, columns * BLOCK)[:M, :K].contiguous(), (amax / 128.0).view(rows, columns)


@triton.jit(do_not_specialize=["M", "num_row_blocks"])
@no_type_check
def quantize_int8_kernel(
    x,
    x8,  # [B, M, K] contiguous
    scales,  # [B, num_row_blocks, num_column_blocks]
    M,
    K,
    num_row_blocks,
    num_column_blocks,
    amax_floor,
    stride_b,
    stride_m,
    BLOCK: tl.constexpr,
):
    i_column = tl.program_id(0)
    i_row = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_m = (i_row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_k = i_column * BLOCK + tl.arange(0, BLOCK)
    inside = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(x + i_b * stride_b + o_m[:, None] * stride_m + o_k[None, :], mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.max(tl.abs(b_x), 1), 0), amax_floor)
    b_scaled = b_x * tl.div_rn(tl.full([], 128.0, dtype=tl.float32), amax)
    # Adding and subtracting 1.5 * 2^23 rounds an fp32 below 2^22 to an integer, halves to even.
    b_rounded = (b_scaled + 12582912.0) - 12582912.0
    b_x8 = tl.minimum(tl.maximum(b_rounded, -128.0), 127.0).to(tl.int8)
    tl.store(x8 + (i_b * M + o_m)[:, None] * K + o_k[None, :], b_x8, mask=inside)
    tl.store(scales + (i_b * num_row_blocks + i_row) * num_column_blocks + i_column, amax * (1.0 / 128.0))


@triton.jit(do_not_specialize=["M", "num_row_blocks"])
@no_type_check
def int8_linear_kernel(
    x8,  # [B, M, K]
    x_scale,  # [B, num_row_blocks, num_k_blocks]
    w8,  # [N, K]
    w_scale,  # [num_column_blocks, num_k_blocks]
    bias,  # [N]
    y,  # [B, M, N] contiguous
    M,
    N,
    K,
    num_row_blocks,
    num_column_blocks,
    num_k_blocks,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BIAS: tl.constexpr,
):
    # Tiles of GROUP rows of blocks, column by column, so that both operands stay in L2.
    i_tile = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    first_row = i_tile // (GROUP * num_column_blocks) * GROUP
    group_rows = tl.minimum(num_row_blocks - first_row, GROUP)
    i_m = first_row + i_tile % (GROUP * num_column_blocks) % group_rows
    i_n = i_tile % (GROUP * num_column_blocks) // group_rows
    o_m = (i_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_n = (i_n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    # Rows past the end read the last row; they are never stored.
    p_x = x8 + (i_b * M + tl.minimum(o_m, M - 1))[:, None] * K + o_k[None, :]
    p_w = w8 + tl.minimum(o_n, N - 1)[None, :] * K + o_k[:, None]
    p_x_scale = x_scale + (i_b * num_row_blocks + i_m) * num_k_blocks
    p_w_scale = w_scale + i_n * num_k_blocks
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for i_k in range(num_k_blocks):
        if WHOLE_K:
            b_x = tl.load(p_x)
            b_w = tl.load(p_w)
        else:
            b_x = tl.load(p_x, mask=(i_k * BLOCK + o_k < K)[None, :], other=0)
            b_w = tl.load(p_w, mask=(i_k * BLOCK + o_k < K)[:, None], other=0)
        b_product = tl.dot(b_x, b_w, out_dtype=tl.int32).to(tl.float32)
        acc += b_product * (tl.load(p_x_scale + i_k) * tl.load(p_w_scale + i_k))
        p_x += BLOCK
        p_w += BLOCK
    if BIAS:
        acc += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    p_y = y + (i_b * M + o_m)[:, None] * N + o_n[None, :]
    tl.store(p_y, acc.to(y.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


def _quantize_triton(x_BMK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, M, K = x_BMK.shape
    x_BMK = x_BMK if x_BMK.stride(-1) == 1 else x_BMK.contiguous()
    rows, columns = num_blocks(M, BLOCK), num_blocks(K, BLOCK)
    x8 = torch.empty(B, M, K, dtype=torch.int8, device=x_BMK.device)
    scale = torch.empty(B, rows, columns, dtype=torch.float32, device=x_BMK.device)
    with device_of(x_BMK):
        # No contraction into FMA where a value is rounded to 8 bits: the reference has none.
        quantize_int8_kernel[(columns, rows, B)](
            x_BMK, x8, scale, M, K, rows, columns, AMAX_FLOOR, *x_BMK.stride()[:2],
            BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return x8, scale


def _int8_linear_triton(
    x_BLK: torch.Tensor, int8_weight_NK: torch.Tensor, weight_scale: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    B, L, K = x_BLK.shape
    N = int8_weight_NK.shape[0]
    x8, x_scale = _quantize_triton(x_BLK)
    y = torch.empty(B, L, N, dtype=x_BLK.dtype, device=x_BLK.device)
    rows, columns = num_blocks(L, BLOCK), num_blocks(N, BLOCK)
    with device_of(x_BLK):
        int8_linear_kernel[(rows * columns, B)](
            x8, x_scale, int8_weight_NK.contiguous(), weight_scale.contiguous(),
            y if bias_N is None else bias_N.contiguous(), y, L, N, K, rows, columns, num_blocks(K, BLOCK),
            BLOCK=BLOCK, GROUP=8, WHOLE_K=K % BLOCK == 0, BIAS=bias_N is not None,
            num_warps=8, num_stages=3, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return y
