"""Which implementation computes an op: chosen by name, never swapped silently.

reference   PyTorch in fp32; any device
triton      the triton-lang kernels of this package; a CUDA GPU, or the CPU under TRITON_INTERPRET=1
spargeattn  the optional package spas_sage_attn; only the `sagesla` attention on a CUDA GPU
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch

try:
    from triton.tools import tensor_descriptor
except ImportError:  # triton before 3.4
    tensor_descriptor = None  # type: ignore[assignment]

PROVIDERS = ("reference", "triton", "spargeattn")

#: Read once, as triton itself reads it once: a kernel is bound to the interpreter when it is decorated.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

#: Contraction of a * b + c, said at every launch: triton 3.10 changes its default, and results must not move with it.
FUSE_FMA = True


def default_provider(device: torch.device | str) -> str:
    """`triton` on a CUDA device, `reference` elsewhere."""
    return "triton" if torch.device(device).type == "cuda" else "reference"


def resolve_provider(
    provider: str | None, device: torch.device, *, op: str, available: tuple[str, ...] = ("reference", "triton")
) -> str:
    """Check that `provider` can compute `op` on `device`; None means the default of the device.

    Raises:
        ValueError: an unknown provider, one that does not offer this op, or one that cannot run on this device.
    """
    if provider is None:
        provider = default_provider(device)
    if provider not in PROVIDERS:
        raise ValueError(f"unknown provider {provider!r}: one of {', '.join(PROVIDERS)}")
    if provider not in available:
        raise ValueError(f"provider {provider!r} does not offer {op}: one of {', '.join(available)}")
    if provider == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"provider 'triton' cannot run {op} on {device}: it needs a CUDA device, "
            "or TRITON_INTERPRET=1 set before turbo_kernels is imported"
        )
    if provider == "spargeattn" and device.type != "cuda":
        raise ValueError(f"provider 'spargeattn' cannot run {op} on {device}: it needs a CUDA device")
    return provider


def has_fp8(device: torch.device) -> bool:
    """Whether the tensor cores of `device` multiply e4m3 (compute capability 8.9 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def has_tile_descriptors(device: torch.device) -> bool:
    """Whether kernels may fetch tiles with the bulk tensor copy engine: compute capability 9.0, triton 3.4 and later.

    The same kernels fetch through pointers elsewhere, to the same bits.
    """
    if tensor_descriptor is None:
        return False
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def tile_descriptors(tiles: torch.Tensor) -> Any:
    """Descriptor of [..., rows, columns], contiguous, from which a kernel loads whole [rows, columns] tiles."""
    rows, columns = tiles.shape[-2:]
    return tensor_descriptor.TensorDescriptor.from_tensor(tiles.view(-1, columns), [rows, columns])


def device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Make x's CUDA device the current one: triton launches on the current device, not on its arguments'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
