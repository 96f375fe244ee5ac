"""How long turns of the denoiser took, and how long others will."""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Sequence

from turbo_backend.stages.scheduler import Task

#: Kinds of turns that are remembered, and how many turns of each.
_MAX_KINDS = 256
_MAX_TURNS = 9


class StepTimes:
    """Remembers the time of turns by what their tasks share and how many they are.

    The first turn of a kind counts for nothing: it may compile kernels.
    """

    def __init__(self) -> None:
        self._seconds: OrderedDict[tuple[object, int], deque[float]] = OrderedDict()
        self._num_tokens: dict[tuple[object, int], int] = {}

    def record(self, tasks: Sequence[Task], seconds: float) -> None:
        """A turn of these tasks took so long."""
        kind = (tasks[0].group, len(tasks))
        if kind in self._seconds:
            self._seconds[kind].append(seconds)
        else:
            self._seconds[kind] = deque(maxlen=_MAX_TURNS)
            self._num_tokens[kind] = tasks[0].num_tokens * len(tasks)
        self._seconds.move_to_end(kind)
        if len(self._seconds) > _MAX_KINDS:
            oldest, _ = self._seconds.popitem(last=False)
            del self._num_tokens[oldest]

    def estimate(self, tasks: Sequence[Task]) -> float | None:
        """Seconds of a turn of these tasks: the median of turns of the kind, else scaled by tokens from the nearest
        kind, of the same shape and attention where there is one; None before any turn was measured."""
        kind = (tasks[0].group, len(tasks))
        measured = [known for known, turns in self._seconds.items() if turns]
        if not measured:
            return None
        num_tokens = tasks[0].num_tokens * len(tasks)
        nearest = min(
            measured,
            key=lambda known: (known != kind, known[0] != kind[0], abs(self._num_tokens[known] - num_tokens)),
        )
        return statistics.median(self._seconds[nearest]) * num_tokens / self._num_tokens[nearest]
