"""Causal 3x3x3 convolution of two frames at once, with what stands around it in the video VAE.

    out[t] = bias + sum_k conv2d(frames[t + k], weight[:, :, k]) [+ residual[t]]          t = 0, 1; k = 0, 1, 2
    y[t]   = silu(out[t] / max(|out[t]|_C, 1e-12) * sqrt(C) * gamma)

Minimal filtering F(2, 3) along time computes both frames from four 2-D convolutions where the sum above takes six:

    m0 = (d0 - d2) * g0                  out[0] = m0 + m1 + m2
    m1 = (d1 + d2) * (g0 + g1 + g2)/2    out[1] = m1 - m2 - m3
    m2 = (d2 - d1) * (g0 - g1 + g2)/2
    m3 = (d1 - d3) * g2

Sums and differences of frames are rounded once to the dtype of the frames on their way to the tensor cores; products
are accumulated in fp32, where bias, residual and norm are applied too. Each program owns a tile of pixels of both
frames, so that results do not depend on what else is computed.

Sources: Winograd, "Arithmetic complexity of computations"; Lavin and Gray, "Fast algorithms for convolutional neural
networks"; Wan2.1 VAE for the layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from turbo_kernels.checks import check_float
from turbo_kernels.norm_silu import norm_silu, norm_silu_reference, silu_of_norm
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

#: Output frames of one call.
PAIR = 2


@dataclass(frozen=True, slots=True, eq=False)
class PairWeights:
    """Weights of a 3x3x3 convolution made ready for `causal_conv3d_pair`.

    Attributes:
        filters: [4 * 9 * C_in, N], row (j * 9 + 3 * ky + kx) * C_in + c holds filter j of the module's formula;
            N is C_out rounded up to a multiple of 16, zeros behind.
        bias: fp32 [N].
        weight: [C_out, C_in, 3, 3, 3] as given, for the reference.
    """

    filters: torch.Tensor
    bias: torch.Tensor
    weight: torch.Tensor

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]


def pair_weights(weight: torch.Tensor, bias: torch.Tensor) -> PairWeights:
    """Transform [C_out, C_in, 3, 3, 3] and [C_out] once, in fp32, rounded to weight's dtype.

    Raises:
        ValueError: another shape or dtype, or C_in not a multiple of 16.
    """
    check_float("weight", weight)
    if weight.ndim != 5 or weight.shape[2:] != (3, 3, 3) or weight.shape[1] % 16:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be [C_out, 16 n, 3, 3, 3]")
    if bias.shape != weight.shape[:1] or bias.device != weight.device:
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}: must be {weight.shape[:1]} on {weight.device}")
    g0, g1, g2 = weight.detach().float().unbind(2)
    filters = torch.stack([g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2])  # [4, C_out, C_in, 3, 3]
    rows = filters.permute(0, 3, 4, 2, 1).reshape(-1, weight.shape[0])
    padding = -weight.shape[0] % 16
    return PairWeights(
        F.pad(rows, (0, padding)).to(weight.dtype).contiguous(),
        F.pad(bias.detach().float(), (0, padding)).contiguous(),
        weight.detach(),
    )


def causal_conv3d_pair(
    past_2HWC: torch.Tensor,
    present_2HWC: torch.Tensor,
    weights: PairWeights,
    *,
    residual_2HWC: torch.Tensor | None = None,
    gamma_C: torch.Tensor | None = None,
    keep_output: bool = True,
    provider: str | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Two frames of the convolution from the two before them and themselves.

    Args:
        past_2HWC, present_2HWC: frames t - 2, t - 1 and t, t + 1: [2, H, W, C_in], channels contiguous.
        weights: of `pair_weights`, in the dtype of the frames.
        residual_2HWC: [2, H, W, C_out], added before rounding.
        gamma_C: [C_out]; asks for silu(norm(out)).
        keep_output: whether `out` itself is wanted.

    Returns:
        out and silu(norm(out)), each [2, H, W, C_out] in the dtype of the frames, None where not asked for.

    Raises:
        ValueError: shapes, dtypes, devices or provider that do not fit, or nothing asked for.
    """
    shape = present_2HWC.shape
    check_float("present", present_2HWC)
    if len(shape) != 4 or shape[0] != PAIR or 0 in shape or shape[3] != weights.in_channels:
        raise ValueError(f"present has shape {tuple(shape)}: must be [2, H, W, {weights.in_channels}], not empty")
    out_shape = (*shape[:3], weights.out_channels)
    for name, x, fits in (
        ("past", past_2HWC, tuple(shape)),
        ("residual", residual_2HWC, out_shape),
        ("filters", weights.filters, tuple(weights.filters.shape)),
        ("gamma", gamma_C, out_shape[3:]),
    ):
        if x is None:
            continue
        if tuple(x.shape) != fits or x.device != present_2HWC.device:
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}: must be {fits} on {present_2HWC.device}")
        if name != "gamma" and x.dtype != present_2HWC.dtype:
            raise ValueError(f"{name} is {x.dtype}: must be {present_2HWC.dtype} as the frames")
    if not keep_output and gamma_C is None:
        raise ValueError("neither the output nor its norm is asked for")
    provider = resolve_provider(provider, present_2HWC.device, op="causal_conv3d_pair")
    if provider == "triton":
        return _pair_triton(past_2HWC, present_2HWC, weights, residual_2HWC, gamma_C, keep_output)
    window_1CTHW = torch.cat([past_2HWC, present_2HWC]).float().permute(3, 0, 1, 2)[None]
    bias = weights.bias[: weights.out_channels]
    out = F.conv3d(window_1CTHW, weights.weight.float(), bias, padding=(0, 1, 1))[0].permute(1, 2, 3, 0)
    if residual_2HWC is not None:
        out = out + residual_2HWC.float()
    y = None if gamma_C is None else norm_silu_reference(out, gamma_C).to(present_2HWC.dtype)
    return out.to(present_2HWC.dtype).contiguous() if keep_output else None, y


@triton.jit
def load_tile(frames, i_frame, i_y, i_x, i_c, M: tl.constexpr, K: tl.constexpr):
    """[M, K]: channels i_c .. of the tile of pixels at (i_y, i_x); zeros outside the frame."""
    return tl.reshape(frames.load([i_frame, i_y, i_x, i_c]), [M, K])


@triton.jit
def finish_tile(
    acc_1, acc_2, residual, gamma, bias, out, y, o_m, inside, i_n, N,
    N1: tl.constexpr, N2: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Bias, residual, norm and SiLU of a tile in fp32, and its stores; o_m are the rows of its pixels, int64."""
    o_1 = i_n + tl.arange(0, N1)
    at_1 = o_m[:, None] * N + o_1[None, :]
    mask_1 = inside[:, None] & (o_1 < N)[None, :]
    acc_1 += tl.load(bias + o_1)[None, :]
    if RESIDUAL:
        acc_1 += tl.load(residual + at_1, mask=mask_1, other=0.0).to(tl.float32)
    if N2 > 0:
        o_2 = i_n + N1 + tl.arange(0, N2)
        at_2 = o_m[:, None] * N + o_2[None, :]
        mask_2 = inside[:, None] & (o_2 < N)[None, :]
        acc_2 += tl.load(bias + o_2)[None, :]
        if RESIDUAL:
            acc_2 += tl.load(residual + at_2, mask=mask_2, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(out + at_1, acc_1.to(out.dtype.element_ty), mask=mask_1)
        if N2 > 0:
            tl.store(out + at_2, acc_2.to(out.dtype.element_ty), mask=mask_2)
    if NORM:
        squares = tl.sum(acc_1 * acc_1, 1)
        if N2 > 0:
            squares += tl.sum(acc_2 * acc_2, 1)
        gamma_1 = tl.load(gamma + o_1, mask=o_1 < N, other=0.0)
        tl.store(y + at_1, silu_of_norm(acc_1, squares, gamma_1, N).to(y.dtype.element_ty), mask=mask_1)
        if N2 > 0:
            gamma_2 = tl.load(gamma + o_2, mask=o_2 < N, other=0.0)
            tl.store(y + at_2, silu_of_norm(acc_2, squares, gamma_2, N).to(y.dtype.element_ty), mask=mask_2)


@triton.jit(do_not_specialize=["num_x", "num_y"])
def causal_conv3d_pair_kernel(
    past,  # descriptor [2, H, W, C]
    present,  # descriptor [2, H, W, C]
    filters_1,  # descriptor [36 C, N rounded up] in blocks of [K, N1]
    filters_2,  # the same in blocks of [K, N2]
    bias,  # fp32 [N rounded up]
    residual,  # [2, H, W, N], RESIDUAL only
    gamma,  # fp32 [N], NORM only
    out,  # [2, H, W, N], KEEP only
    y,  # [2, H, W, N], NORM only
    H,
    W,
    N,
    num_x,
    num_y,
    C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    K: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    NUM_N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
):
    M: tl.constexpr = TILE_H * TILE_W
    SLICES: tl.constexpr = C // K
    # Programs of one tile of pixels are neighbours: they read the same frames.
    i_n = (tl.program_id(0) % NUM_N) * (N1 + N2)
    i_tile = tl.program_id(0) // NUM_N
    i_x = (i_tile % num_x) * TILE_W
    i_y = (i_tile // num_x) * TILE_H
    sum_1 = tl.zeros([M, N1], dtype=tl.float32)
    dif_1 = tl.zeros([M, N1], dtype=tl.float32)
    if N2 > 0:
        sum_2 = tl.zeros([M, N2], dtype=tl.float32)
        dif_2 = tl.zeros([M, N2], dtype=tl.float32)
    for i in range(9 * SLICES):
        i_c = (i % SLICES) * K
        k_y = i // SLICES // 3 - 1 + i_y
        k_x = i // SLICES % 3 - 1 + i_x
        row = i // SLICES * C + i_c
        d1 = load_tile(past, 1, k_y, k_x, i_c, M, K)
        d2 = load_tile(present, 0, k_y, k_x, i_c, M, K)
        plus = d1 + d2
        minus = d2 - d1
        sum_1 = tl.dot(plus, filters_1.load([9 * C + row, i_n]), sum_1, input_precision="ieee")
        if N2 > 0:
            sum_2 = tl.dot(plus, filters_2.load([9 * C + row, i_n + N1]), sum_2, input_precision="ieee")
        dif_1 = tl.dot(minus, filters_1.load([18 * C + row, i_n]), dif_1, input_precision="ieee")
        if N2 > 0:
            dif_2 = tl.dot(minus, filters_2.load([18 * C + row, i_n + N1]), dif_2, input_precision="ieee")
    # m1 + m2 begins the first frame, m1 - m2 the second.
    first_1 = sum_1 + dif_1
    second_1 = sum_1 - dif_1
    first_2 = first_1
    second_2 = second_1
    if N2 > 0:
        first_2 = sum_2 + dif_2
        second_2 = sum_2 - dif_2
    for i in range(9 * SLICES):
        i_c = (i % SLICES) * K
        k_y = i // SLICES // 3 - 1 + i_y
        k_x = i // SLICES % 3 - 1 + i_x
        row = i // SLICES * C + i_c
        early = load_tile(past, 0, k_y, k_x, i_c, M, K) - load_tile(present, 0, k_y, k_x, i_c, M, K)
        late = load_tile(present, 1, k_y, k_x, i_c, M, K) - load_tile(past, 1, k_y, k_x, i_c, M, K)
        first_1 = tl.dot(early, filters_1.load([row, i_n]), first_1, input_precision="ieee")
        if N2 > 0:
            first_2 = tl.dot(early, filters_2.load([row, i_n + N1]), first_2, input_precision="ieee")
        second_1 = tl.dot(late, filters_1.load([27 * C + row, i_n]), second_1, input_precision="ieee")
        if N2 > 0:
            second_2 = tl.dot(late, filters_2.load([27 * C + row, i_n + N1]), second_2, input_precision="ieee")
    o_y = i_y + tl.arange(0, M) // TILE_W
    o_x = i_x + tl.arange(0, M) % TILE_W
    inside = (o_y < H) & (o_x < W)
    o_m = o_y.to(tl.int64) * W + o_x
    finish_tile(first_1, first_2, residual, gamma, bias, out, y, o_m, inside, i_n, N, N1, N2, RESIDUAL, NORM, KEEP)
    finish_tile(
        second_1, second_2, residual, gamma, bias, out, y, o_m + H.to(tl.int64) * W, inside, i_n, N,
        N1, N2, RESIDUAL, NORM, KEEP,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a convolution is cut: pixels and channels of a program, and how it is compiled."""

    pixels: int
    slice: int
    columns: tuple[int, int]
    num_warps: int
    num_stages: int


def tile_shape(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Height and width, powers of two, of a tile of `pixels` that wastes least; the widest of equals."""
    shapes = [(pixels // w, w) for w in (128, 64, 32, 16, 8) if w <= pixels]
    return min(shapes, key=lambda s: (math.ceil(height / s[0]) * math.ceil(width / s[1]), s[0]))


def slice_of(channels: int, largest: int) -> int:
    """Largest power of two that divides `channels`, at most `largest`."""
    return min(channels & -channels, largest)


def split_columns(channels: int) -> tuple[int, int]:
    """Output channels of one program as two powers of two, the second 0 for none; together they divide `channels`."""
    if channels % 96 == 0 and channels % 128:
        return 64, 32
    return slice_of(channels, 128), 0


def has_large_shared_memory(x: torch.Tensor) -> bool:
    """Whether a program of x's device may take more than 160 KiB of shared memory (compute 8.0, 9.0, 10.0)."""
    if x.device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin > 160_000


def pair_tiling(in_channels: int, columns: int, large: bool) -> Tiling:
    n1, n2 = split_columns(columns)
    return Tiling(128, slice_of(in_channels, 32), (n1, n2), 8, 4 if large else 2)


def frame_descriptor(frames_THWC: torch.Tensor, block: tuple[int, int, int]) -> TensorDescriptor:
    """Frames read in tiles of [1, *block] (height, width, channels)."""
    return TensorDescriptor(frames_THWC, list(frames_THWC.shape), list(frames_THWC.stride()), [1, *block])


def readable(frames_THWC: torch.Tensor) -> torch.Tensor:
    """The frames, copied if a tensor descriptor cannot address them (contiguous channels, 16-byte strides)."""
    size = frames_THWC.element_size()
    aligned = frames_THWC.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in frames_THWC.stride()[:3])
    return frames_THWC if aligned and frames_THWC.stride(3) == 1 else frames_THWC.contiguous()


def _new(frames: torch.Tensor, channels: int) -> torch.Tensor:
    return torch.empty(*frames.shape[:3], channels, dtype=frames.dtype, device=frames.device)


def _pair_triton(
    past: torch.Tensor,
    present: torch.Tensor,
    weights: PairWeights,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    keep_output: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    _, H, W, C = present.shape
    N = weights.out_channels
    columns = weights.filters.shape[1]
    tiling = pair_tiling(C, columns, has_large_shared_memory(present))
    n1, n2 = tiling.columns
    num_n = columns // (n1 + n2)
    fused = gamma is not None and num_n == 1
    out = _new(present, N) if keep_output or not fused else None
    y = _new(present, N) if fused else None
    tile_h, tile_w = tile_shape(H, W, tiling.pixels)
    num_y, num_x = triton.cdiv(H, tile_h), triton.cdiv(W, tile_w)
    block = (tile_h, tile_w, tiling.slice)
    filters_1 = TensorDescriptor.from_tensor(weights.filters, [tiling.slice, n1])
    filters_2 = TensorDescriptor.from_tensor(weights.filters, [tiling.slice, n2 or n1])
    with device_of(present):
        causal_conv3d_pair_kernel[(num_n * num_x * num_y,)](
            frame_descriptor(readable(past), block), frame_descriptor(readable(present), block), filters_1, filters_2,
            weights.bias,
            weights.bias if residual is None else residual.contiguous(),
            gamma.float().contiguous() if fused and gamma is not None else weights.bias,
            weights.bias if out is None else out,
            weights.bias if y is None else y,
            H, W, N, num_x, num_y,
            C=C, TILE_H=tile_h, TILE_W=tile_w, K=tiling.slice, N1=n1, N2=n2, NUM_N=num_n,
            RESIDUAL=residual is not None, NORM=fused, KEEP=out is not None,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    if gamma is not None and out is not None and y is None:
        y = norm_silu(out, gamma, out=None if keep_output else out, provider="triton")
    return out if keep_output else None, y
