"""Gaussian noise that depends on (seed, step) alone: not on device, batch, or what ran before.

Bits come from Philox4x64-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3"), keyed by the pair, so any step's noise can be drawn first, again, or on another machine: a request that
is resumed or batched sees the noise it would have seen alone.

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
        shape: shape of one sample, such as [16, T, h, w].

    Returns:
        float32 tensor of that shape on the CPU.

    Raises:
        InvalidArgument: seed or step out of range.
    """
    if not 0 <= seed < 2**64:
        raise InvalidArgument("SEED", seed, "0 to 2**64 - 1")
    if not 0 <= step < 2**64:
        raise InvalidArgument("step", step, "a step index, 0 or more")
    key = np.array([seed, step], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
