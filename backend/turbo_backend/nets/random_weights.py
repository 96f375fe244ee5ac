"""Seeded random weights for any network of this package: tests, and benches at real shapes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from turbo_backend.memory import empty_gpu_cache

#: Bytes of a float32 draft whose memory goes back before the next: smaller tensors would settle in it for good.
_LARGE_DRAFT = 1 << 28
#: Standard deviation of the integers -127 to 127, all equally likely.
_INT8_STD = math.sqrt((255**2 - 1) / 12)


def initialize_random(
    net: nn.Module,
    seed: int,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    keep_fp32: Sequence[str] = (),
    generator_device: torch.device | None = None,
) -> None:
    """Gives every parameter, and every int8 weight, random values that let signals through at a sane size.

    Weights are normal with standard deviation fan_in^-1/2 (no layer starts at zero, `proj_l` included), norm weights
    are 1 + 0.1 n, biases 0.02 n. A tensor's values depend on the seed and its own name and shape, not on the order
    of tensors nor on the rest of the network.

    Args:
        net: may be on `meta`; tensors are replaced one at a time.
        device: where to put the weights; by default where they are.
        dtype: of floating-point parameters; by default their own.
        keep_fp32: parts of names whose tensors are float32 whatever `dtype` says.
        generator_device: draw with that device's own generator: fast, but other devices draw other values. By
            default values come from the CPU (numpy's Philox) and are the same everywhere.

    Raises:
        ValueError: a net on `meta` without `device`.
    """
    for module_name, module in net.named_modules():
        own = [(name, tensor, True) for name, tensor in module.named_parameters(recurse=False)]
        if "int8_weight" in dict(module.named_buffers(recurse=False)):
            own += [(name, tensor, False) for name, tensor in module.named_buffers(recurse=False)]
        for name, tensor, is_parameter in own:
            full_name = f"{module_name}.{name}".lstrip(".")
            target = tensor.device if device is None else device
            if target.type == "meta":
                raise ValueError(f"{full_name} is on meta: say on which device its weights shall be")
            values = _draw(full_name, module, tensor.shape, seed, generator_device)
            is_large = values.is_cuda and values.nbytes >= _LARGE_DRAFT
            if tensor.is_floating_point():
                is_kept = name == "scale" or any(part in full_name for part in keep_fp32)
                values = values.to(torch.float32 if is_kept else dtype or tensor.dtype)
            values = values.to(target)
            setattr(module, name, nn.Parameter(values, requires_grad=False) if is_parameter else values)
            if is_large:
                empty_gpu_cache()


def _draw(
    name: str, module: nn.Module, shape: torch.Size, seed: int, generator_device: torch.device | None
) -> torch.Tensor:
    """float32 values, or int8 ones of an int8 weight."""
    if name.endswith("int8_weight"):
        return _integers(name, shape, seed, generator_device)
    if name.endswith(".scale"):
        in_features = module.get_buffer("int8_weight").shape[1]
        return torch.full(shape, 1 / (_INT8_STD * math.sqrt(in_features)))
    mean, std = _distribution(name, shape)
    return _normals(name, shape, seed, generator_device).mul_(std).add_(mean)


def _distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter by its name."""
    if name.endswith("modulation"):
        return 0.0, shape[-1] ** -0.5
    if sum(size > 1 for size in shape) <= 1 and name.endswith(("weight", "gamma")) and len(shape) != 2:
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.02
    if name.endswith(("token_embedding.weight", "pos_embedding.embedding.weight")):
        return 0.0, 1.0
    std = math.prod(shape[1:]) ** -0.5
    if name.endswith(".attn.q.weight"):
        # UMT5 neither normalises nor scales its logits; T5 leaves head_dim^-1/2 to the weights of q.
        std /= 8
    return 0.0, std


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _numpy_generator(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, _key(name)], dtype=np.uint64)))


def _device_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(_key(f"{seed} {name}") >> 1)


def _normals(name: str, shape: torch.Size, seed: int, device: torch.device | None) -> torch.Tensor:
    if device is None:
        return torch.from_numpy(_numpy_generator(name, seed).standard_normal(tuple(shape), dtype=np.float32))
    return torch.randn(shape, generator=_device_generator(name, seed, device), device=device)


def _integers(name: str, shape: torch.Size, seed: int, device: torch.device | None) -> torch.Tensor:
    if device is None:
        values = _numpy_generator(name, seed).integers(-127, 128, tuple(shape), dtype=np.int8)
        return torch.from_numpy(values)
    generator = _device_generator(name, seed, device)
    return torch.randint(-127, 128, shape, generator=generator, device=device, dtype=torch.int8)
