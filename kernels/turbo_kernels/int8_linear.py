"""Linear layer of 8-bit weights and activations (W8A8) with one scale for each 128 x 128 block.

    amax  = max(1e-8, max|x|) over the block
    x8    = saturate(round_half_even(x * 128 / amax)), scale = amax / 128        (+amax becomes 127, -amax -128)
    y     = sum over K blocks of a_scale * w_scale * (a8 w8^T)_int32  + bias

Activations are quantised a sample at a time, so that no block straddles two samples of a batch (upstream flattens
the batch, which makes a request's result depend on its neighbours). Source: upstream TurboDiffusion (quant_linear).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbo_kernels.block_map import num_blocks
from turbo_kernels.checks import check_float
from turbo_kernels.providers import resolve_provider

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
