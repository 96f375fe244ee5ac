"""Gaussian noise that depends on (seed, step) alone: not on device, batch, or what ran before.

Bits come from Philox4x64-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3"), keyed by the pair, so any step's noise can be drawn first, again, or on another machine: a request that
is resumed or batched sees the noise it would have seen alone. Each channel has a range of the counter to itself, so
that threads can draw channels side by side.

Portability: the Philox bit stream is fixed by numpy for good; the ziggurat that turns bits into normal deviates is
numpy's `Generator.standard_normal`, which numpy may in principle change between releases. A test pins its
values, so such a change would be noticed. Seeds do not reproduce upstream's CUDA noise, which itself differs
between GPU models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from turbo_backend.errors import InvalidArgument


def draw_noise(seed: int, step: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise of one request at one step.

    Args:
        seed: 0 to 2**64 - 1.
        step: 0 is the initial noise, i >= 1 the noise mixed in by the end of the i-th step.
        shape: shape of one sample, such as [16, T, h, w], the channels first.

    Returns:
        float32 tensor of that shape on the CPU.

    Raises:
        InvalidArgument: seed or step out of range.
    """
    noise = torch.empty(tuple(shape))
    for channel in range(noise.shape[0]):
        draw_channel(noise, seed, step, channel)
    return noise


def draw_channel(noise: torch.Tensor, seed: int, step: int, channel: int) -> None:
    """Fills `noise[channel]` as `draw_noise` does; threads may each draw channels of the same tensor.

    Args:
        noise: float32, contiguous, on the CPU.

    Raises:
        InvalidArgument: seed or step out of range.
    """
    if not 0 <= seed < 2**64:
        raise InvalidArgument("SEED", seed, "0 to 2**64 - 1")
    if not 0 <= step < 2**64:
        raise InvalidArgument("step", step, "a step index, 0 or more")
    key, counter = np.array([seed, step], dtype=np.uint64), np.array([0, 0, 0, channel], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    generator.standard_normal(dtype=np.float32, out=noise[channel].reshape(-1).numpy())
