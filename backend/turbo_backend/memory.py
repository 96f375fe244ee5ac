"""Memory: what a request will need, refused before the run where it cannot fit, and out-of-memory errors told apart."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from turbo_backend.config import DiTConfig, VAEConfig
from turbo_backend.errors import ResourceExhausted, TurboError
from turbo_backend.parameters import GenerationParameters

_log = logging.getLogger(__name__)


def denoiser_bytes(config: DiTConfig, parameters: GenerationParameters, dtype: torch.dtype) -> int:
    """Workspace of one denoising step, in bytes (weights not counted).

    A block's live tensors at its widest point: the residual stream, its norm, q, k, v and the attention output of
    `[L, D]`, or the two FFN activations of `[L, ffn_dim]`; then the state in float64 and the noise in float32.
    """
    tokens = parameters.num_tokens
    widest = max(10 * config.dim, 3 * config.dim + 2 * config.ffn_dim)
    t, h, w = parameters.latent_shape
    return tokens * widest * dtype.itemsize + 5 * config.out_channels * t * h * w * 8


def decoder_bytes(config: VAEConfig, parameters: GenerationParameters, dtype: torch.dtype) -> int:
    """Workspace of decoding one video chunk by chunk, in bytes: convolution caches, the widest chunk, the frames."""
    pixels = parameters.width * parameters.height
    chunk = 4 * pixels * config.base_dim * dtype.itemsize
    return 14 * chunk + parameters.num_frames * pixels * 3


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation can have: free on the GPU plus what PyTorch's cache holds unused, or free RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise TurboError("/proc/meminfo has no MemAvailable line")


def check_fits(needed: int, device: torch.device, what: str) -> None:
    """Refuses work that the device's free memory cannot hold.

    Raises:
        ResourceExhausted: with both figures.
    """
    free = free_bytes(device)
    if needed > free:
        raise ResourceExhausted(f"{what} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on {device}")


def as_turbo_error(error: Exception, stage: str) -> TurboError:
    """The error a caller is told: ours as they are, out of memory by name, anything else INTERNAL and logged."""
    if isinstance(error, TurboError):
        return error
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if out_of_memory:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning("%s ran out of memory: %s", stage, error)
        return ResourceExhausted(f"{stage} ran out of memory; ask for fewer frames or a lower resolution")
    _log.error("%s failed", stage, exc_info=error)
    return TurboError(f"{stage} failed: {type(error).__name__}: {error}")
