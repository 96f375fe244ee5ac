"""Tensors on their way to the host, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


class HostCopy:
    """A copy of a tensor to the host, queued behind the work that makes the tensor.

    From a GPU it goes to page-locked memory, which goes back to PyTorch's cache of it with the array; a tensor that is
    on the host already is not copied.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # Sleeps while it waits: other threads have use for the processor.
            self._arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrival.record()
        else:
            self._host = tensor

    def wait(self) -> NDArray[Any]:
        """The array, once it is there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._host.numpy()
