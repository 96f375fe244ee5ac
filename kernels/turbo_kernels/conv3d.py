"""Causal 3x3x3 convolution of a few frames, with what stands around it in the video VAE.

    out[t] = bias + sum_k conv2d(frames[t + k], weight[:, :, k]) [+ residual[t]]          k = 0, 1, 2
    y[t]   = silu(out[t] / max(|out[t]|_C, 1e-12) * sqrt(C) * gamma)

An implicit matrix product over 9 places in space, slices of channels and 3 places in time: a program owns a tile of
pixels of all output frames, and with it the accumulators of each. Traffic between L2 cache and the multiprocessors is
what limits it, so each tile of a frame and each slice of the weights is fetched once for all frames that it meets. Sums
are taken in fp32, where bias, residual and norm are applied too. Reads outside a frame give zeros by tensor descriptor.

Source: Wan2.1 VAE for the layers.
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
from turbo_kernels.norm_silu import norm_silu, norm_silu_reference
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

#: Frames before the first that a convolution sees.
PAST = 2


@dataclass(frozen=True, slots=True, eq=False)
class ConvWeights:
    """Weights of a 3x3x3 convolution made ready for `causal_conv3d`.

    Attributes:
        filters: [27 * C_in, N], row (9 * kt + 3 * ky + kx) * C_in + c; N is C_out rounded up to a multiple of 16,
            zeros behind.
        bias: fp32 [N].
        out_channels: C_out.
    """

    filters: torch.Tensor
    bias: torch.Tensor
    out_channels: int

    @property
    def in_channels(self) -> int:
        return self.filters.shape[0] // 27


def conv_weights(weight: torch.Tensor, bias: torch.Tensor) -> ConvWeights:
    """Lay out [C_out, C_in, 3, 3, 3] and [C_out] once.

    Raises:
        ValueError: another shape or dtype, or C_in not a multiple of 16.
    """
    check_float("weight", weight)
    if weight.ndim != 5 or weight.shape[2:] != (3, 3, 3) or weight.shape[1] % 16:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be [C_out, 16 n, 3, 3, 3]")
    if bias.shape != weight.shape[:1] or bias.device != weight.device:
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}: must be {weight.shape[:1]} on {weight.device}")
    rows = weight.detach().permute(2, 3, 4, 1, 0).reshape(-1, weight.shape[0])
    padding = -weight.shape[0] % 16
    return ConvWeights(
        F.pad(rows, (0, padding)).contiguous(), F.pad(bias.detach().float(), (0, padding)).contiguous(), len(weight)
    )


def causal_conv3d(
    frames_RHWC: torch.Tensor,
    weights: ConvWeights,
    *,
    first: int,
    num_frames: int,
    residual_THWC: torch.Tensor | None = None,
    gamma_C: torch.Tensor | None = None,
    keep_output: bool = True,
    norm_out_RHWC: torch.Tensor | None = None,
    norm_first: int = 0,
    provider: str | None = None,
) -> torch.Tensor | None:
    """Frames of the convolution from rings of frames: frame i of a ring of R lies at place i mod R, so none is moved.

    Args:
        frames_RHWC: [R, H, W, C_in], channels contiguous.
        weights: of `conv_weights`, in the dtype of the frames.
        first: frames `first` .. `first + num_frames + 1` are seen: two of the past, then `num_frames` new ones.
        num_frames: T, at most R - 2.
        residual_THWC: [T, H, W, C_out], added before rounding.
        gamma_C: [C_out]; asks for silu(norm(out)).
        keep_output: whether `out` itself is wanted.
        norm_out_RHWC: [R', H, W, C_out], contiguous; silu(norm(out)) is written from frame `norm_first` on.

    Returns:
        out [T, H, W, C_out] in the dtype of the frames, None if not wanted.

    Raises:
        ValueError: shapes, dtypes, devices or provider that do not fit, or nothing asked for.
    """
    shape = frames_RHWC.shape
    check_float("frames", frames_RHWC)
    if len(shape) != 4 or 0 in shape or shape[3] != weights.in_channels:
        raise ValueError(f"frames have shape {tuple(shape)}: must be [R, H, W, {weights.in_channels}], not empty")
    if first < 0 or norm_first < 0 or not 1 <= num_frames <= shape[0] - PAST:
        raise ValueError(f"frames {first} and {num_frames} after two do not fit a ring of {shape[0]}")
    check_like_frames("filters", weights.filters, tuple(weights.filters.shape), frames_RHWC)
    out_shape = (num_frames, *shape[1:3], weights.out_channels)
    if residual_THWC is not None:
        check_like_frames("residual", residual_THWC, out_shape, frames_RHWC)
    if (gamma_C is None) != (norm_out_RHWC is None) or (gamma_C is None and not keep_output):
        raise ValueError("gamma and norm_out must be given together, or the output kept")
    if gamma_C is not None and norm_out_RHWC is not None:
        check_norm_out(gamma_C, norm_out_RHWC, out_shape, frames_RHWC)
    provider = resolve_provider(provider, frames_RHWC.device, op="causal_conv3d")
    if provider == "triton":
        return _conv_triton(
            frames_RHWC, weights, first, num_frames, residual_THWC, gamma_C, keep_output, norm_out_RHWC, norm_first
        )
    places = [(first + i) % shape[0] for i in range(num_frames + PAST)]
    window_1CTHW = frames_RHWC[places].float().permute(3, 0, 1, 2)[None]
    weight = weights.filters[:, : weights.out_channels].float().view(3, 3, 3, shape[3], -1).permute(4, 3, 0, 1, 2)
    bias = weights.bias[: weights.out_channels]
    out = F.conv3d(window_1CTHW, weight, bias, padding=(0, 1, 1))[0].permute(1, 2, 3, 0)
    if residual_THWC is not None:
        out = out + residual_THWC.float()
    if gamma_C is not None and norm_out_RHWC is not None:
        write_frames(norm_silu_reference(out, gamma_C), norm_out_RHWC, norm_first)
    return out.to(frames_RHWC.dtype).contiguous() if keep_output else None


def check_like_frames(name: str, x: torch.Tensor, shape: tuple[int, ...], frames: torch.Tensor) -> None:
    """Raise ValueError unless x has this shape, and dtype and device of `frames`."""
    if tuple(x.shape) != shape or x.dtype != frames.dtype or x.device != frames.device:
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: must be {frames.dtype} {shape} on {frames.device}"
        )


def check_norm_out(
    gamma_C: torch.Tensor, norm_out_RHWC: torch.Tensor, out_shape: tuple[int, ...], frames: torch.Tensor
) -> None:
    """Raise ValueError unless silu(norm) of an output of `out_shape` can be written to this ring."""
    if gamma_C.shape != out_shape[3:] or gamma_C.device != frames.device:
        raise ValueError(f"gamma is {tuple(gamma_C.shape)} on {gamma_C.device}: must be {out_shape[3:]}")
    check_like_frames("norm_out", norm_out_RHWC, (len(norm_out_RHWC), *out_shape[1:]), frames)
    if len(norm_out_RHWC) < out_shape[0] or not norm_out_RHWC.is_contiguous():
        raise ValueError(f"norm_out must be contiguous and hold {out_shape[0]} frames")


def write_frames(frames_THWC: torch.Tensor, ring_RHWC: torch.Tensor, first: int) -> None:
    """Copy frames to places `first`, `first` + 1 ... of a ring."""
    for t, frame in enumerate(frames_THWC):
        ring_RHWC[(first + t) % len(ring_RHWC)] = frame


def norm_silu_into(x_THWC: torch.Tensor, gamma_C: torch.Tensor, ring_RHWC: torch.Tensor, first: int) -> None:
    """silu(norm(x)) to places `first` .. of a ring by the kernel, in one or two runs of frames."""
    begin = first % len(ring_RHWC)
    head = min(len(x_THWC), len(ring_RHWC) - begin)
    norm_silu(x_THWC[:head], gamma_C, out=ring_RHWC[begin : begin + head], provider="triton")
    if head < len(x_THWC):
        norm_silu(x_THWC[head:], gamma_C, out=ring_RHWC[: len(x_THWC) - head], provider="triton")


@triton.jit
@no_type_check
def _load_filters(filters, row, i_n, C: tl.constexpr):
    """[K, N] of each place in time, from those rows of the first one on."""
    return filters.load([row, i_n]), filters.load([row + 9 * C, i_n]), filters.load([row + 18 * C, i_n])


@triton.jit(do_not_specialize=["H", "W", "first", "norm_first", "num_x"])
@no_type_check
def causal_conv3d_kernel(
    frames,  # descriptor [R, H, W, C] in blocks of K channels
    filters_1,  # descriptor [27 C, N rounded up] in blocks of [K, N1]
    filters_2,  # the same in blocks of [K, N2]
    bias,  # fp32 [N rounded up]
    residual,  # [T, H, W, N], RESIDUAL only
    gamma,  # fp32 [N], NORM only
    out,  # [T, H, W, N], KEEP only
    y,  # [norm_R, H, W, N], NORM only
    H,
    W,
    N,
    first,
    R,
    norm_first,
    norm_R,
    num_x,
    C: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    K: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    NUM_N: tl.constexpr,
    FETCH_ONCE: tl.constexpr,
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
    i_t = tl.program_id(1) * FRAMES
    accs_1 = (tl.zeros([M, N1], dtype=tl.float32),) * FRAMES
    accs_2 = accs_1
    if N2 > 0:
        accs_2 = (tl.zeros([M, N2], dtype=tl.float32),) * FRAMES
    if FETCH_ONCE:
        for i in range(9 * SLICES):
            i_c = i % SLICES * K
            tap = i // SLICES
            b_f1 = _load_filters(filters_1, tap * C + i_c, i_n, C)
            b_f2 = _load_filters(filters_2, tap * C + i_c, i_n + N1, C) if N2 > 0 else b_f1
            for f in tl.static_range(FRAMES + 2):
                b_x = load_tile(frames, (first + i_t + f) % R, tap // 3 - 1 + i_y, tap % 3 - 1 + i_x, i_c, M, K)
                for k_t in tl.static_range(3):
                    if f >= k_t and f - k_t < FRAMES:
                        b_acc = tl.dot(b_x, b_f1[k_t], accs_1[f - k_t], input_precision="ieee")
                        accs_1 = accs_1[: f - k_t] + (b_acc,) + accs_1[f - k_t + 1 :]  # noqa: RUF005
                        if N2 > 0:
                            b_acc = tl.dot(b_x, b_f2[k_t], accs_2[f - k_t], input_precision="ieee")
                            accs_2 = accs_2[: f - k_t] + (b_acc,) + accs_2[f - k_t + 1 :]  # noqa: RUF005
    else:
        # One product an accumulator in each turn: the compiler leaves those in flight.
        for i in range(27 * SLICES):
            k_t = i % 3
            i_c = i // 3 % SLICES * K
            tap = i // (3 * SLICES)
            row = (9 * k_t + tap) * C + i_c
            b_f1 = filters_1.load([row, i_n])
            if N2 > 0:
                b_f2 = filters_2.load([row, i_n + N1])
            for t in tl.static_range(FRAMES):
                b_x = load_tile(frames, (first + i_t + t + k_t) % R, tap // 3 - 1 + i_y, tap % 3 - 1 + i_x, i_c, M, K)
                b_acc = tl.dot(b_x, b_f1, accs_1[t], input_precision="ieee")
                accs_1 = accs_1[:t] + (b_acc,) + accs_1[t + 1 :]  # noqa: RUF005
                if N2 > 0:
                    b_acc = tl.dot(b_x, b_f2, accs_2[t], input_precision="ieee")
                    accs_2 = accs_2[:t] + (b_acc,) + accs_2[t + 1 :]  # noqa: RUF005
    o_y = i_y + tl.arange(0, M) // TILE_W
    o_x = i_x + tl.arange(0, M) % TILE_W
    inside = (o_y < H) & (o_x < W)
    for t in tl.static_range(FRAMES):
        o_m = (o_y + (i_t + t) * H).to(tl.int64) * W + o_x
        o_norm = (o_y + (norm_first + i_t + t) % norm_R * H).to(tl.int64) * W + o_x
        finish_tile(
            accs_1[t], accs_2[t], residual, gamma, bias, out, y, o_m, o_norm, inside, i_n, N, N1, N2,
            RESIDUAL, NORM, KEEP,
        )  # fmt: skip


def conv_tiling(in_channels: int, columns: int, num_frames: int, large: bool) -> Tiling:
    """Measured on an H100 at 96, 192 and 384 channels, and at 3 columns.

    Bytes from the L2 cache decide, so a program takes as many frames and columns as its registers hold; two programs of
    96 columns share a multiprocessor, which hides the end of one, and its waits, behind the middle of the other. From
    192 columns on there is work enough for each byte, and fetching once gains nothing.
    """
    pair = 2 - num_frames % 2
    most = 4 if num_frames % 4 == 0 else pair
    if columns % 192 == 0 and large:
        return Tiling(pair, 128, slice_of(in_channels, 64), (128, 64), 8, 3)
    if columns % 96 == 0:
        return Tiling(most if large else pair, 64, slice_of(in_channels, 32), (64, 32), 4, 2, fetch_once=True)
    stages = 3 if large else 2
    return Tiling(most, 128, slice_of(in_channels, 32), (slice_of(columns, 32), 0), 8, stages, fetch_once=True)


def _conv_triton(
    frames: torch.Tensor,
    weights: ConvWeights,
    first: int,
    num_frames: int,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    keep_output: bool,
    norm_out: torch.Tensor | None,
    norm_first: int,
) -> torch.Tensor | None:
    R, H, W, C = frames.shape
    N = weights.out_channels
    columns = weights.filters.shape[1]
    tiling = conv_tiling(C, columns, num_frames, has_large_shared_memory(frames))
    k, (n1, n2) = tiling.slice, tiling.columns
    num_n = columns // (n1 + n2)
    # A program that holds all channels of its pixels takes the norm too, as long as that leaves it enough registers.
    fused = gamma is not None and num_n == 1 and n1 + n2 < 192
    keeps = keep_output or not fused
    out = torch.empty(num_frames, H, W, N, dtype=frames.dtype, device=frames.device) if keeps else None
    tile_h, tile_w = tile_shape(H, W, tiling.pixels)
    num_y, num_x = triton.cdiv(H, tile_h), triton.cdiv(W, tile_w)
    frames = readable(frames)
    unused = weights.bias
    with device_of(frames):
        causal_conv3d_kernel[(num_n * num_x * num_y, num_frames // tiling.frames)](
            frame_descriptor(frames, (tile_h, tile_w, k)),
            *(TensorDescriptor.from_tensor(weights.filters, [k, n]) for n in (n1, n2 or n1)),
            weights.bias,
            unused if residual is None else residual.contiguous(),
            gamma.float().contiguous() if fused and gamma is not None else unused,
            unused if out is None else out,
            norm_out if fused else unused,
            H, W, N, first % R, R, norm_first, 1 if norm_out is None else len(norm_out), num_x,
            C=C, FRAMES=tiling.frames, TILE_H=tile_h, TILE_W=tile_w, K=k, N1=n1, N2=n2, NUM_N=num_n,
            FETCH_ONCE=tiling.fetch_once, RESIDUAL=residual is not None, NORM=fused, KEEP=keeps,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    if gamma is not None and norm_out is not None and out is not None and not fused:
        norm_silu_into(out, gamma, norm_out, norm_first)
    return out if keep_output else None
