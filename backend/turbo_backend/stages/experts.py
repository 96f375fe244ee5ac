"""Where the denoiser networks of a model are: all on the device, or one there and the others in the host's memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from turbo_backend.nets.dit import WanDiT


class Experts(Protocol):
    """The networks of one model, the high-noise one first; one thread uses them.

    Attributes:
        placement: `resident` or `swapped`, for the report.
        switch_is_free: whether going from one expert to another costs nothing.
    """

    placement: str
    switch_is_free: bool

    def select(self, expert: int) -> WanDiT:
        """The network of that expert, ready to run on the device."""

    def switch_during_next_run(self, expert: int) -> None:
        """Lets the next run of the selected network be its last: `expert` is brought in behind it."""


class ResidentExperts:
    """All networks on the device."""

    placement = "resident"
    switch_is_free = True

    def __init__(self, nets: Sequence[WanDiT]) -> None:
        self._nets = tuple(nets)

    def select(self, expert: int) -> WanDiT:
        return self._nets[expert]

    def switch_during_next_run(self, expert: int) -> None:
        """Nothing to do."""


class SwappedExperts:
    """One set of weights on the device, all of them in page-locked host memory.

    The experts have the same shapes, so the incoming weights are written over the outgoing ones: the device never
    holds more than one network. In the last run of the outgoing expert each block's weights are replaced as soon as
    the block's kernels are through, on a stream of its own, while later blocks compute; only what the last block and
    the head leave over is waited for. Without CUDA the copies are made in place of being queued.

    Args:
        hosts: one network for each expert on the CPU, with equal shapes and dtypes. Their tensors are replaced by
            page-locked ones, one at a time, where the device is a GPU.
        net: the same architecture on `meta`, which becomes the network on the device.
        device: where it runs.
    """

    placement = "swapped"
    switch_is_free = False

    def __init__(self, hosts: Sequence[WanDiT], net: WanDiT, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._hosts = [_lock_pages(host) if self._stream else host.state_dict() for host in hosts]
        # A copy in any case: the CPU as device would share the first host's tensors, which are then written over.
        net.load_state_dict({name: host.to(device, copy=True) for name, host in self._hosts[0].items()}, assign=True)
        self._net = net.eval().requires_grad_(False)
        self._tensors = net.state_dict()
        self._loaded: int | None = 0
        self._incoming: int | None = None
        self._groups: dict[str, list[str]] = defaultdict(list)
        for name in self._tensors:
            self._groups[_group(name)].append(name)
        for number, block in enumerate(net.blocks):
            block.register_forward_hook(self._replace_after(f"blocks.{number}"))
        net.register_forward_hook(self._replace_after(""))

    def select(self, expert: int) -> WanDiT:
        self._incoming = None
        if self._loaded != expert:
            self._loaded = None
            for group in self._groups:
                self._replace(group, expert)
            self._loaded = expert
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._net

    def switch_during_next_run(self, expert: int) -> None:
        if expert != self._loaded:
            self._incoming = expert
            self._loaded = None  # until the run is through: one that fails leaves a mixture

    def _replace_after(self, group: str) -> Any:
        def hook(*_: object) -> None:
            if self._incoming is not None:
                self._replace(group, self._incoming)
                if not group:  # the network itself, whose hook comes last
                    self._loaded, self._incoming = self._incoming, None

        return hook

    def _replace(self, group: str, expert: int) -> None:
        host = self._hosts[expert]
        if self._stream is None:
            for name in self._groups[group]:
                self._tensors[name].copy_(host[name])
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name in self._groups[group]:
                self._tensors[name].copy_(host[name], non_blocking=True)


def _group(name: str) -> str:
    """`blocks.7` for what belongs to a block, and one group for all the rest."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else ""


def _lock_pages(host: WanDiT) -> dict[str, torch.Tensor]:
    locked = {}
    for name in list(host.state_dict()):
        module_name, _, own_name = name.rpartition(".")
        module = host.get_submodule(module_name)
        tensor = getattr(module, own_name)
        locked[name] = tensor.detach().pin_memory()
        tensor.data = torch.empty(0, dtype=tensor.dtype)  # gives the pageable memory back
    return locked
