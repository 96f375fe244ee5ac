"""The order in which queued jobs start."""

from __future__ import annotations

import time
from collections.abc import Callable

from turbo_backend.jobs.records import JobRequest

#: A job is overtaken by at most this many later ones for each priority level between them, so that none waits for ever.
OVERTAKING = 32
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0


class JobQueue:
    """Jobs that wait for their turn; not safe in threads by itself.

    Args:
        monotonic: seconds that never go back.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._waiting: dict[str, tuple[int, float]] = {}
        self._failures: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._waiting

    def put(self, request: JobRequest) -> None:
        """Lets a job wait for its turn, at once."""
        self._waiting[request.job_id] = (_rank(request), 0.0)

    def put_back(self, request: JobRequest) -> None:
        """Lets a job wait that could not run now, and longer each time that this happens in a row."""
        failures = self._failures[request.job_id] = self._failures.get(request.job_id, 0) + 1
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1))
        self._waiting[request.job_id] = (_rank(request), self._monotonic() + pause)

    def failures(self, job_id: str) -> int:
        """How often in a row a job was put back."""
        return self._failures.get(job_id, 0)

    def remove(self, job_id: str) -> bool:
        """Takes a job out, for good; False when it did not wait."""
        self._failures.pop(job_id, None)
        return self._waiting.pop(job_id, None) is not None

    def take(self) -> str | None:
        """The job whose turn it is, None while there is none."""
        now = self._monotonic()
        ready = [(rank, job_id) for job_id, (rank, earliest) in self._waiting.items() if earliest <= now]
        if not ready:
            return None
        _, job_id = min(ready)
        del self._waiting[job_id]
        return job_id

    def pause(self) -> float | None:
        """Seconds until a job may become ready by itself, None when only a new one can."""
        if not self._waiting:
            return None
        return max(0.0, min(earliest for _, earliest in self._waiting.values()) - self._monotonic())


def _rank(request: JobRequest) -> int:
    """By submission, with a lead for the urgent: no clock, no ageing, and the same order after a restart."""
    return request.sequence + OVERTAKING * request.priority_level
