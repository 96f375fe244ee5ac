"""Numeric check of a provider on the device it will serve on, run when a server loads.

Every op runs once on fresh random inputs, ragged in every blocked dimension, and is compared with the fp32 PyTorch
formula *without* quantisation:

    error = ||out - reference|| / ||reference||

The ops and their limits are those of `self_check_ops`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from turbo_kernels.providers import resolve_provider
from turbo_kernels.self_check_ops import OpErrors, check_attention, check_block, check_row_ops


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Outcome of a check.

    Attributes:
        passed: no op is over its limit.
        details: error of each op.
        limits: the largest error allowed for each op.
        dtype: what the inputs were rounded to.
    """

    passed: bool
    details: dict[str, float]
    limits: dict[str, float] = field(default_factory=dict)
    dtype: str = ""


def self_check(device: torch.device | str, head_dim: int, provider: str | None = None) -> SelfCheck:
    """Run every op that `provider` offers and compare it with the fp32 reference.

    Inputs are bf16 on a GPU, fp32 on the CPU. A kernel that does not compile or launch raises its own error.

    Raises:
        ValueError: a provider that cannot run on this device, or a head_dim other than 64 and 128.
    """
    device = torch.device(device)
    available = ("reference", "triton", "spargeattn")
    provider = resolve_provider(provider, device, op="the self-check", available=available)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ops = OpErrors(device, dtype, head_dim, provider)
    check_attention(ops)
    if provider != "spargeattn":
        check_row_ops(ops)
        check_block(ops)
    passed = all(ops.errors[name] <= ops.limits[name] for name in ops.errors)
    return SelfCheck(passed, ops.errors, ops.limits, str(dtype).removeprefix("torch."))
