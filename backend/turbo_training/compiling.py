"""What makes a training step quick on a GPU: small functions compiled, and whole steps recorded."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compile_often(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, compiled for each combination of shapes, gradient mode and autocast that comes.

    After eight of them PyTorch would go back to plain execution without an error. Mark what varies in size with
    `torch._dynamo.maybe_mark_dynamic`: each combination takes about a second.
    """
    torch._dynamo.config.recompile_limit = 128
    torch._inductor.config.compile_threads = 1  # a pool of processes takes longer to start than such functions
    return torch.compile(function)


class RecordedSteps:
    """Steps of one stage recorded as CUDA graphs, one for each key; on a CPU they just run.

    The host launches the thousands of small kernels of a tiny model's step in more time than they take; a recorded step
    is one launch. What differs from one step to the next must be in its key or in tensors that it reads; random numbers
    go on as usual. The first step of a key runs as it is, the second is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]] | None] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, key: Hashable, step: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """One step: forward, backward, and the optimizer, which must be capturable; returns its losses."""
        if self._stream is None:
            return step()
        if key not in self._graphs:
            self._graphs[key] = None
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                losses = step()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            return {name: loss.detach().clone() for name, loss in losses.items()}
        recorded = self._graphs[key]
        if recorded is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                losses = {name: loss.detach() for name, loss in step().items()}
            recorded = self._graphs[key] = graph, losses
        graph, losses = recorded
        graph.replay()
        return {name: loss.clone() for name, loss in losses.items()}
