"""Where the denoiser networks of a model are: all on the device, each on its own, or one there and all on the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from turbo_backend.nets.dit import WanDiT

#: Bytes at which a tensor begins in the host's memory.
_ALIGNMENT = 512


class Experts(Protocol):
    """The networks of one model, the high-noise one first; one thread uses them.

    Attributes:
        placement: `resident`, `spread` or `swapped`, for the report.
        switch_is_free: whether going from one expert to another costs nothing.
    """

    placement: str
    switch_is_free: bool

    @property
    def networks(self) -> tuple[WanDiT, ...]:
        """The networks that run, each with the weights of one expert or now of this, now of that one."""

    def select(self, expert: int) -> WanDiT:
        """The network of that expert, ready to run on the device."""

    def switch_during_next_run(self, expert: int) -> None:
        """Lets the next run of the selected network be its last: `expert` is brought in behind it."""


class ResidentExperts:
    """All networks on the device."""

    placement = "resident"
    switch_is_free = True

    def __init__(self, nets: Sequence[WanDiT]) -> None:
        self.networks = tuple(nets)

    def select(self, expert: int) -> WanDiT:
        return self.networks[expert]

    def switch_during_next_run(self, expert: int) -> None:
        """Nothing to do."""


class SpreadExperts(ResidentExperts):
    """Each network on a GPU of its own; the state stays on the home device.

    A network elsewhere is given its inputs there, and its estimate comes home: 19 MB each way at 720p in bfloat16.

    Args:
        nets: where they run, the first on the home device.
        home: where latents come from and estimates go to.
    """

    placement = "spread"

    def __init__(self, nets: Sequence[WanDiT], home: torch.device) -> None:
        super().__init__(nets)
        for net in nets:
            if net.device != home:
                net.register_forward_pre_hook(lambda net, inputs: _moved(inputs, net.device))
                net.register_forward_hook(lambda _, inputs, estimate: estimate.to(home))


class SwappedExperts:
    """One set of weights on the device, all of them in page-locked host memory.

    The experts have the same shapes, so the incoming weights are written over the outgoing ones: the device never
    holds more than one network. In the last run of the outgoing expert each block's weights are replaced as soon as
    the block's kernels are through, on a stream of its own, while later blocks compute; only what the last block and
    the head leave over is waited for. Without CUDA the copies are made in place of being queued.

    Args:
        load: for each expert, what loads it on the device, ready to run. They are called one after another and each
            network is copied to the host; the last one stays and is the one that runs.
        device: where it runs.
    """

    placement = "swapped"
    switch_is_free = False

    def __init__(self, load: Sequence[Callable[[], WanDiT]], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._net: WanDiT | None = None
        self._hosts: list[dict[str, torch.Tensor]] = []
        for load_expert in load:
            self._net = None  # frees the one before
            self._net = load_expert()
            self._hosts.append(_to_host(dict(_named_tensors(self._net)), page_locked=self._stream is not None))
        assert self._net is not None
        self._tensors = dict(_named_tensors(self._net))
        self._loaded: int | None = len(load) - 1
        self._incoming: int | None = None
        self._groups: dict[str, list[str]] = defaultdict(list)
        for name in self._tensors:
            self._groups[_group(name)].append(name)
        self._net.after_block = lambda number: self._replace_incoming(f"blocks.{number}")
        self._net.register_forward_hook(lambda *_: self._finish_switch())

    @property
    def networks(self) -> tuple[WanDiT, ...]:
        assert self._net is not None
        return (self._net,)

    def select(self, expert: int) -> WanDiT:
        self._incoming = None
        if self._loaded != expert:
            self._loaded = None
            for group in self._groups:
                self._replace(group, expert)
            self._loaded = expert
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        assert self._net is not None
        return self._net

    def switch_during_next_run(self, expert: int) -> None:
        if expert != self._loaded:
            self._incoming = expert
            self._loaded = None  # until the run is through: one that fails leaves a mixture

    def _replace_incoming(self, group: str) -> None:
        if self._incoming is not None:
            self._replace(group, self._incoming)

    def _finish_switch(self) -> None:
        if self._incoming is not None:
            self._replace("", self._incoming)
            self._loaded, self._incoming = self._incoming, None

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


def _moved(inputs: tuple[object, ...], device: torch.device) -> tuple[object, ...]:
    """The same with its tensors on `device`; a text context is made by its network and is there."""
    return tuple(one.to(device) if isinstance(one, torch.Tensor) else one for one in inputs)


def _group(name: str) -> str:
    """`blocks.7` for what belongs to a block, and one group for all the rest."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else ""


def _named_tensors(net: WanDiT) -> Iterator[tuple[str, torch.Tensor]]:
    """All that distinguishes one expert from another, what no checkpoint holds included."""
    yield from net.named_parameters()
    yield from net.named_buffers()


def _to_host(tensors: Mapping[str, torch.Tensor], *, page_locked: bool) -> dict[str, torch.Tensor]:
    """Copies in one piece of the host's memory, page-locked for a GPU to read.

    PyTorch's own page-locked tensors are rounded up to powers of two: 82 GB for the two experts of 57.
    """
    starts = list(accumulate((-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()), initial=0))
    memory = torch.empty(starts[-1], dtype=torch.uint8)
    if page_locked:
        # It stays so until the process ends, as the weights stay.
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    hosts = {}
    for start, (name, tensor) in zip(starts, tensors.items(), strict=False):
        hosts[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        hosts[name].copy_(tensor.detach())
    return hosts
