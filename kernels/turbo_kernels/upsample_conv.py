"""Nearest-pixel doubling of height and width and the 3x3 convolution behind it, without the doubled frames.

    out[2i + a, 2j + b] = bias + conv3x3(doubled x)[2i + a, 2j + b]           a, b = 0, 1
                        = bias + sum over ky, kx = 0, 1 of x[i - 1 + a + ky, j - 1 + b + kx] * f[a, b, ky, kx]

Each of four phases sees 2x2 pixels of x, since rows 2i and 2i + 1 of the doubled frame are one row: f sums the taps
that meet the same pixel (f[0, ., 0] = g0 and f[0, ., 1] = g1 + g2 in rows; f[1, ., 0] = g0 + g1 and f[1, ., 1] = g2),
4 products a value where the doubled frames take 9. Optionally the norm and SiLU that follow, as in `conv3d`.

Sources: Shi et al., "Is the deconvolution layer the same as a convolutional layer?"; Wan2.1 VAE for the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from turbo_kernels.checks import check_float
from turbo_kernels.conv3d import check_like_frames, check_norm_out, norm_silu_into, write_frames
from turbo_kernels.conv_tiles import (
    Tiling,
    finish_tile,
    frame_descriptor,
    has_large_shared_memory,
    load_tile,
    readable,
    slice_of,
    tile_shape,
)
from turbo_kernels.norm_silu import norm_silu_reference
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider


@dataclass(frozen=True, slots=True, eq=False)
class UpsampleWeights:
    """Weights of a 3x3 convolution made ready for `upsample_conv`.

    Attributes:
        filters: [16 * C_in, C_out], row ((2a + b) * 4 + 2 ky + kx) * C_in + c holds f[a, b, ky, kx] of the formula.
        bias: fp32 [C_out].
        weight: [C_out, C_in, 3, 3] as given, for the reference.
    """

    filters: torch.Tensor
    bias: torch.Tensor
    weight: torch.Tensor


def upsample_weights(weight: torch.Tensor, bias: torch.Tensor) -> UpsampleWeights:
    """Transform [C_out, C_in, 3, 3] and [C_out] once, in fp32, rounded to weight's dtype.

    Raises:
        ValueError: another shape or dtype, or channels not a multiple of 16.
    """
    check_float("weight", weight)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be [16 m, 16 n, 3, 3]")
    if bias.shape != weight.shape[:1] or bias.device != weight.device:
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}: must be {weight.shape[:1]} on {weight.device}")
    fold = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device
    )  # [phase, tap of two, tap of three]
    filters = torch.einsum("apy,bqx,ncyx->abpqcn", fold, fold, weight.detach().float())
    rows = filters.reshape(-1, weight.shape[0]).to(weight.dtype).contiguous()
    return UpsampleWeights(rows, bias.detach().float().contiguous(), weight.detach())


def upsample_conv(
    x_THWC: torch.Tensor,
    weights: UpsampleWeights,
    *,
    gamma_C: torch.Tensor | None = None,
    norm_out_RHWC: torch.Tensor | None = None,
    norm_first: int = 0,
    provider: str | None = None,
) -> torch.Tensor:
    """Frames doubled in height and width and convolved.

    Args:
        x_THWC: [T, H, W, C_in], channels contiguous.
        weights: of `upsample_weights`, in the dtype of the frames.
        gamma_C: [C_out]; asks for silu(norm(out)).
        norm_out_RHWC: [R, 2H, 2W, C_out], contiguous; a ring where silu(norm(out)) is written from frame
            `norm_first` on.

    Returns:
        out [T, 2H, 2W, C_out] in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or provider that do not fit.
    """
    check_float("x", x_THWC)
    channels = weights.weight.shape[1]
    if x_THWC.ndim != 4 or 0 in x_THWC.shape or x_THWC.shape[3] != channels:
        raise ValueError(f"x has shape {tuple(x_THWC.shape)}: must be [T, H, W, {channels}], not empty")
    check_like_frames("filters", weights.filters, tuple(weights.filters.shape), x_THWC)
    if (gamma_C is None) != (norm_out_RHWC is None):
        raise ValueError("gamma and norm_out must be given together")
    if gamma_C is not None and norm_out_RHWC is not None:
        num_frames, height, width, _ = x_THWC.shape
        check_norm_out(gamma_C, norm_out_RHWC, (num_frames, 2 * height, 2 * width, len(weights.bias)), x_THWC)
    provider = resolve_provider(provider, x_THWC.device, op="upsample_conv")
    if provider == "triton":
        return _upsample_triton(x_THWC, weights, gamma_C, norm_out_RHWC, norm_first)
    doubled_TCHW = F.interpolate(x_THWC.float().permute(0, 3, 1, 2), scale_factor=2, mode="nearest-exact")
    out = F.conv2d(doubled_TCHW, weights.weight.float(), weights.bias, padding=1).permute(0, 2, 3, 1).contiguous()
    if gamma_C is not None and norm_out_RHWC is not None:
        write_frames(norm_silu_reference(out, gamma_C), norm_out_RHWC, norm_first)
    return out.to(x_THWC.dtype)


@triton.jit(do_not_specialize=["H", "W", "norm_first", "num_x"])
@no_type_check
def upsample_conv_kernel(
    x,  # descriptor [T, H, W, C]
    filters_1,  # descriptor [16 C, N] in blocks of [K, N1]
    filters_2,  # the same in blocks of [K, N2]
    bias,  # fp32 [N]
    gamma,  # fp32 [N], NORM only
    out,  # [T, 2H, 2W, N]
    y,  # [norm_R, 2H, 2W, N], NORM only
    H,
    W,
    N,
    norm_first,
    norm_R,
    num_x,
    C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    K: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    NUM_N: tl.constexpr,
    NORM: tl.constexpr,
):
    M: tl.constexpr = TILE_H * TILE_W
    SLICES: tl.constexpr = C // K
    i_n = (tl.program_id(0) % NUM_N) * (N1 + N2)
    phase = tl.program_id(0) // NUM_N % 4
    i_tile = tl.program_id(0) // NUM_N // 4
    i_x = (i_tile % num_x) * TILE_W
    i_y = (i_tile // num_x) * TILE_H
    i_t = tl.program_id(1)
    acc_1 = tl.zeros([M, N1], dtype=tl.float32)
    acc_2 = tl.zeros([M, N2], dtype=tl.float32) if N2 > 0 else acc_1
    for i in range(4 * SLICES):
        i_c = (i % SLICES) * K
        tap = i // SLICES
        b_x = load_tile(x, i_t, i_y - 1 + phase // 2 + tap // 2, i_x - 1 + phase % 2 + tap % 2, i_c, M, K)
        row = (phase * 4 + tap) * C + i_c
        acc_1 = tl.dot(b_x, filters_1.load([row, i_n]), acc_1, input_precision="ieee")
        if N2 > 0:
            acc_2 = tl.dot(b_x, filters_2.load([row, i_n + N1]), acc_2, input_precision="ieee")
    o_y = i_y + tl.arange(0, M) // TILE_W
    o_x = i_x + tl.arange(0, M) % TILE_W
    inside = (o_y < H) & (o_x < W)
    row = 2 * o_y + phase // 2
    column = 2 * o_x + phase % 2
    o_m = (i_t * 2 * H + row).to(tl.int64) * 2 * W + column
    o_norm = ((norm_first + i_t) % norm_R * 2 * H + row).to(tl.int64) * 2 * W + column
    finish_tile(acc_1, acc_2, bias, gamma, bias, out, y, o_m, o_norm, inside, i_n, N, N1, N2, False, NORM, True)


def upsample_tiling(in_channels: int, out_channels: int, large: bool) -> Tiling:
    """All channels in one program up to 192, so that it can take the norm."""
    channels = slice_of(in_channels, 64 if large else 32)
    for n1, n2 in ((64, 32), (128, 64)):
        if out_channels == n1 + n2 and (large or n1 == 64):
            return Tiling(1, 128, channels, (n1, n2), 8, 3)
    return Tiling(1, 128, channels, (slice_of(out_channels, 128 if large else 64), 0), 8, 3 if large else 2)


def _upsample_triton(
    x: torch.Tensor,
    weights: UpsampleWeights,
    gamma: torch.Tensor | None,
    norm_out: torch.Tensor | None,
    norm_first: int,
) -> torch.Tensor:
    T, H, W, C = x.shape
    N = weights.filters.shape[1]
    tiling = upsample_tiling(C, N, has_large_shared_memory(x))
    k, (n1, n2) = tiling.slice, tiling.columns
    num_n = N // (n1 + n2)
    fused = gamma is not None and num_n == 1
    out = torch.empty(T, 2 * H, 2 * W, N, dtype=x.dtype, device=x.device)
    tile_h, tile_w = tile_shape(H, W, tiling.pixels)
    num_y, num_x = triton.cdiv(H, tile_h), triton.cdiv(W, tile_w)
    with device_of(x):
        upsample_conv_kernel[(num_n * 4 * num_x * num_y, T)](
            frame_descriptor(readable(x), (tile_h, tile_w, k)),
            TensorDescriptor.from_tensor(weights.filters, [k, n1]),
            TensorDescriptor.from_tensor(weights.filters, [k, n2 or n1]),
            weights.bias, gamma.float().contiguous() if fused and gamma is not None else weights.bias,
            out, norm_out if fused else weights.bias,
            H, W, N, norm_first, 1 if norm_out is None else len(norm_out), num_x,
            C=C, TILE_H=tile_h, TILE_W=tile_w, K=k, N1=n1, N2=n2, NUM_N=num_n, NORM=fused,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    if gamma is not None and norm_out is not None and not fused:
        norm_silu_into(out, gamma, norm_out, norm_first)
    return out
