"""What the parts of `bench_gpu.py` have in common: a row of its table, timing on one GPU, and profiles.

A part is a module with

    TARGETS             {row: Target}, in the order in which the rows are measured
    check()             its gate: what was compared, with "passed"
    measure(names, profiled)    yields a finished row for each of the names
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CUDA = torch.device("cuda")
GIB = 2**30
#: Kernels of a profile.
_NUM_KERNELS = 28
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Target:
    """What a row is held to: the target, what would be better still, upstream's figure, and its own limit of memory."""

    value: float
    beyond: float | None = None
    upstream: float | None = None
    gib: float | None = None
    unit: str = "ms"

    def row(self, name: str, value: float, *, peak_gib: float | None = None, **facts: object) -> Row:
        """The row of a measured value."""
        row: Row = {
            "name": name, "value": round(value, 3), "unit": self.unit, "target": self.value, "beyond": self.beyond,
            "upstream": self.upstream, "met": value <= self.value,
        }  # fmt: skip
        if peak_gib is not None:
            row["peak_gib"] = round(peak_gib, 2)
            if self.gib is not None:
                row |= {"target_gib": self.gib, "met_gib": peak_gib <= self.gib}
        return row | facts


def time_ms(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median of CUDA event times."""
    times = []
    for i in range(repeats + warm_up):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= warm_up:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def release_memory() -> None:
    """Give back what nothing uses, networks that hold themselves in a cycle included."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Gives a function that tells the most memory reserved since, in GiB; what is not in use is let go first."""
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_reserved() / GIB


def profile(run: Callable[[], object]) -> list[Row]:
    """Milliseconds and launches of each kernel of one call, longest first, after a line for all of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    rows: list[Row] = [
        {"kernel": event.key[:90], "ms": round(event.self_device_time_total / 1000, 3), "launches": event.count}
        for event in events
    ]
    total: Row = {
        "kernel": "all", "ms": round(sum(event.self_device_time_total for event in events) / 1000, 3),
        "launches": sum(event.count for event in events),
    }  # fmt: skip
    return [total, *rows[:_NUM_KERNELS]]


def relative_rmse(out: torch.Tensor, exact: torch.Tensor) -> float:
    """||out - exact|| / ||exact||."""
    return float((out.float() - exact).norm() / exact.norm())
