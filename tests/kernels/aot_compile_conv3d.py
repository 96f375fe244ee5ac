"""Compile the kernels of the video VAE for one architecture without a GPU, as `aot_compile.py` does."""

from __future__ import annotations

import json
import sys
from typing import Any

import aot_compile
import torch

from turbo_kernels import conv3d, norm_silu, upsample_conv

#: H, W, C_in, C_out, frames; residual, norm, output: the heaviest of each tiling at 480p, and one of the tiny model.
CONVOLUTIONS = (
    (120, 208, 384, 384, 2, True, True, True),
    (480, 832, 96, 96, 4, True, True, True),
    (480, 832, 96, 3, 4, False, False, True),
    (144, 256, 16, 16, 4, True, True, True),
)
UPSAMPLINGS = ((60, 104, 384, 192), (72, 128, 32, 16))


def record_launches(capability: int) -> list[tuple[Any, dict, dict]]:
    """(kernel, arguments by name, options) of every launch."""
    launches = aot_compile.start_recording()

    def frames(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    large = capability in (80, 90, 100)
    conv3d.has_large_shared_memory = upsample_conv.has_large_shared_memory = lambda x: large
    for H, W, C, N, T, residual, norm, keep in CONVOLUTIONS:
        conv3d.causal_conv3d(
            frames(T + 2, H, W, C),
            conv3d.conv_weights(frames(N, C, 3, 3, 3), torch.empty(N)),
            first=0,
            num_frames=T,
            residual_THWC=frames(T, H, W, N) if residual else None,
            gamma_C=torch.empty(N) if norm else None,
            keep_output=keep,
            norm_out_RHWC=frames(T + 2, H, W, N) if norm else None,
            provider="triton",
        )
    for H, W, C, N in UPSAMPLINGS:
        upsample_conv.upsample_conv(
            frames(2, H, W, C),
            upsample_conv.upsample_weights(frames(N, C, 3, 3), torch.empty(N)),
            gamma_C=torch.empty(N),
            norm_out_RHWC=frames(4, 2 * H, 2 * W, N),
            provider="triton",
        )
    norm_silu.norm_silu(frames(1, 2, 2, 96), torch.empty(96), provider="triton")
    return launches


if __name__ == "__main__":
    aot_compile.record_launches = record_launches
    for argument in sys.argv[1:]:
        report = {"capability": int(argument), "kernels": aot_compile.compile_all(int(argument))}
        print(json.dumps(report), flush=True)
