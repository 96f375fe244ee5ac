"""Argument checks shared by the attention ops: every refusal is a ValueError naming what was received."""

from __future__ import annotations

import torch

HEAD_DIMS = (64, 128)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_float(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless x is fp32, fp16 or bf16."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} is {x.dtype}: must be float32, float16 or bfloat16")


def check_attention_inputs(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors are [B, L, H, D] alike, D 64 or 128 and contiguous within a head."""
    names = ", ".join(tensors)
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        check_float(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be [B, L, H, D]")
        if x.shape != first.shape:
            raise ValueError(f"{names} must have one shape, not {[tuple(t.shape) for t in tensors.values()]}")
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{names} must have one dtype and device, not {[(t.dtype, t.device) for t in tensors.values()]}"
            )
        if x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {x.stride()}: the last dimension must be contiguous")
    if first.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head_dim is {first.shape[-1]}: must be 64 or 128")
    if 0 in first.shape:
        raise ValueError(f"{names} are empty: {tuple(first.shape)}")
