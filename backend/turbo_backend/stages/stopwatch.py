"""How long queued work takes the device, without waiting for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Runs from its making to `stop`, on the device's own clock: a GPU's queue may be behind the host.

    Args:
        device: on a GPU its current stream is timed, elsewhere the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    def milliseconds(self) -> float:
        """From beginning to end; on a GPU once it has come that far."""
        begin, end = self._marks
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            elapsed: float = begin.elapsed_time(end)
            return elapsed
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return (end - begin) * 1000

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
