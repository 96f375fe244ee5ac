"""Rotary position table of the Wan transformer (RoPE; Su et al., "RoFormer"), three axes in one head."""

from __future__ import annotations

from functools import lru_cache

import torch

from turbo_backend.errors import InvalidArgument

_THETA = 10000.0
#: Positions that upstream's table holds on each axis.
MAX_POSITION = 128


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, height and width: (44, 42, 42) of 128, (24, 20, 20) of 64."""
    dim_side = head_dim // 6 * 2
    return head_dim - 2 * dim_side, dim_side, dim_side


@lru_cache(maxsize=8)
def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> torch.Tensor:
    """Cosine and sine by token and channel pair, made once a grid and device.

    The pair (2i, 2i + 1) of an axis with d channels at integer position p turns by p * 10000^(-2i / d); pairs of
    the time axis come first, then height, then width (22, 21 and 21 pairs of a 128-channel head). Tokens are in
    the order (t, h, w) with w fastest. Angles are made in float64, of each axis by itself and on the CPU, and are laid
    out on the device.

    Args:
        grid: (T, h, w) in patches, each 1 to 128.

    Returns:
        float32 [L, head_dim / 2, 2] holding (cos, sin), L = T * h * w. Shared between callers: do not write to it.

    Raises:
        InvalidArgument: a grid beyond the table.
    """
    if not all(1 <= size <= MAX_POSITION for size in grid):
        raise InvalidArgument("latent size in patches", grid, f"1 to {MAX_POSITION} on each axis")
    axes = []
    for axis, (size, dim) in enumerate(zip(grid, split_head_dim(head_dim), strict=True)):
        frequencies = _THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
        turns = torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)
        shape = [1, 1, 1, dim // 2, 2]
        shape[axis] = size
        axes.append(turns.view(shape).expand(*grid, dim // 2, 2))
    return torch.cat(axes, dim=-2).flatten(0, 2)
