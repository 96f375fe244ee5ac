"""Filling a network built on the meta device with the weights of a file, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from turbo_backend.checkpoints.comparison import compare, explain
from turbo_backend.checkpoints.reader import Checkpoint
from turbo_backend.errors import CheckpointError

_QUANTIZE_ROWS = 1024  # a multiple of the 128-row blocks of the quantizer


def load_into(
    network: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_fp32: Sequence[str] = (),
    quantize: bool = False,
) -> None:
    """Assigns every parameter and persistent buffer of `network` from `checkpoint`, strictly.

    Keys are compared as a whole before the first tensor is read. Then each tensor is copied out of the mapped file,
    converted and assigned before the next is touched: besides the network itself, at most one copy of one tensor is
    held. Floating tensors become `dtype`, whatever floating type the file has for them (the published files mix
    bfloat16 and float32), except those named in `keep_fp32` and the scales of int8 weights, which become float32;
    integers stay as they are.

    Args:
        network: built under `torch.device("meta")`.
        checkpoint: an open file; it may be closed (dropped) afterwards, nothing refers to it.
        device: where the weights go.
        dtype: floating type of the weights.
        keep_fp32: parts of keys, such as `"norm3."`, as a network names them in its `KEEP_FP32`.
        quantize: for linears that were replaced by int8 ones, make `int8_weight` and `scale` from a floating
            `weight`, as the published quantized files were made.

    Raises:
        CheckpointError: the file does not fit; one report names all missing, extra and misshaped keys.
            The network is untouched in that case.
    """
    device = torch.device(device)
    needed = network_specs(network)
    found = {key: (checkpoint.shape(key), checkpoint.dtype(key)) for key in checkpoint}
    comparison = compare(found, needed, quantize=quantize)
    if not comparison.fits:
        raise CheckpointError(explain(checkpoint.path, comparison, found, needed))
    quantized = {f"{name}.weight": name for name in comparison.to_quantize}
    for key in checkpoint:  # in the order of the file, which reads the disk in sequence
        stored = checkpoint.tensor(key)
        if key in quantized:
            int8_weight, scale = _quantize(stored, device)
            _assign(network, f"{quantized[key]}.int8_weight", int8_weight)
            _assign(network, f"{quantized[key]}.scale", scale)
            continue
        wanted = needed[key][1]
        if wanted.is_floating_point:
            is_scale = key.endswith(".scale") and f"{key.removesuffix('.scale')}.int8_weight" in needed
            kept = is_scale or any(part in key for part in keep_fp32)
            wanted = torch.float32 if kept else dtype
        _assign(network, key, _place(stored, device, wanted))
        del stored
    _check_complete(network)
    network.requires_grad_(False)


def network_specs(network: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Keys, shapes and dtypes that a network needs."""
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in network.state_dict().items()}


def _place(stored: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A copy on `device`, contiguous; on a GPU the conversion happens there, so the host holds no copy at all."""
    if device.type == "cpu":
        return stored.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return stored.to(device).to(dtype).contiguous()


def _quantize(stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 weight and block scales of a [N, K] weight, some rows at a time: blocks of 128 rows are independent."""
    from turbo_kernels import quantize_int8_blockwise

    scales = []
    int8_weight = torch.empty(stored.shape, dtype=torch.int8, device=device)
    for start in range(0, stored.shape[0], _QUANTIZE_ROWS):
        rows = stored[start : start + _QUANTIZE_ROWS].to(device).float()
        int8_rows, scale = quantize_int8_blockwise(rows)
        int8_weight[start : start + _QUANTIZE_ROWS] = int8_rows
        scales.append(scale)
    return int8_weight, torch.cat(scales)


def _assign(network: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Puts `tensor` in the place of the meta tensor of that name."""
    owner_name, _, leaf = key.rpartition(".")
    owner = network.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _check_complete(network: nn.Module) -> None:
    left = [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(network).__name__} keeps non-persistent buffers on the meta device: {left[:5]}")
