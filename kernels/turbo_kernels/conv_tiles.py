"""What the convolutions of the video VAE share: tiles of pixels, how they are read, finished and stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from turbo_kernels.norm_silu import silu_of_norm


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a convolution is cut and compiled.

    Attributes:
        frames: output frames of a program.
        pixels: of a program in each of them.
        slice: channels of C_in a turn.
        columns: output channels of a program, the sum of two powers of two, the second 0 for none.
        fetch_once: a turn takes all three places in time, so that a tile of a frame serves up to three of them: fewer
            bytes, but the products of an accumulator wait for each other. Else a turn takes one.
    """

    frames: int
    pixels: int
    slice: int
    columns: tuple[int, int]
    num_warps: int
    num_stages: int
    fetch_once: bool = False


def tile_shape(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Height and width, powers of two, of a tile of `pixels` that wastes least; the widest of equals."""
    shapes = [(pixels // w, w) for w in (128, 64, 32, 16, 8) if w <= pixels]
    return min(shapes, key=lambda s: (math.ceil(height / s[0]) * math.ceil(width / s[1]), s[0]))


def slice_of(channels: int, largest: int) -> int:
    """Largest power of two that divides `channels`, at most `largest`."""
    return min(channels & -channels, largest)


def has_large_shared_memory(x: torch.Tensor) -> bool:
    """Whether a program of x's device may take more than 160 KiB of shared memory (compute 8.0, 9.0, 10.0)."""
    if x.device.type != "cuda":
        return False
    size: int = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return size > 160_000


def frame_descriptor(frames_THWC: torch.Tensor, block: tuple[int, int, int]) -> TensorDescriptor:
    """Frames read in tiles of [1, *block] (height, width, channels)."""
    return TensorDescriptor(frames_THWC, list(frames_THWC.shape), list(frames_THWC.stride()), [1, *block])


def readable(frames_THWC: torch.Tensor) -> torch.Tensor:
    """The frames, copied if a tensor descriptor cannot address them (contiguous channels, 16-byte strides)."""
    size = frames_THWC.element_size()
    aligned = frames_THWC.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in frames_THWC.stride()[:3])
    return frames_THWC if aligned and frames_THWC.stride(3) == 1 else frames_THWC.contiguous()


@triton.jit
@no_type_check
def load_tile(frames, i_frame, i_y, i_x, i_c, M: tl.constexpr, K: tl.constexpr):
    """[M, K]: channels i_c .. of the tile of pixels at (i_y, i_x); zeros outside the frame."""
    return tl.reshape(frames.load([i_frame, i_y, i_x, i_c]), [M, K])


@triton.jit
@no_type_check
def finish_tile(
    acc_1, acc_2, residual, gamma, bias, out, y, o_m, o_norm, inside, i_n, N,
    N1: tl.constexpr, N2: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Bias, residual, norm and SiLU of a tile in fp32, and its stores; int64 rows of its pixels in out and y."""
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
        norm_at_1 = o_norm[:, None] * N + o_1[None, :]
        squares = tl.sum(acc_1 * acc_1, 1)
        if N2 > 0:
            squares += tl.sum(acc_2 * acc_2, 1)
        gamma_1 = tl.load(gamma + o_1, mask=o_1 < N, other=0.0)
        tl.store(y + norm_at_1, silu_of_norm(acc_1, squares, gamma_1, N).to(y.dtype.element_ty), mask=mask_1)
        if N2 > 0:
            gamma_2 = tl.load(gamma + o_2, mask=o_2 < N, other=0.0)
            norm_at_2 = o_norm[:, None] * N + o_2[None, :]
            tl.store(y + norm_at_2, silu_of_norm(acc_2, squares, gamma_2, N).to(y.dtype.element_ty), mask=mask_2)
