"""What each job has reported, for whoever watches it: from now on, or from where a watcher was cut off."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

#: Jobs whose reports are kept, and reports kept of each.
_JOBS = 256
_EVENTS = 192
#: Events of one start, so that a watcher's cursor stays good over a restart.
_NUMBERS = 1 << 32


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a job's work is done.

    Attributes:
        number: ascending over all jobs; a watcher's cursor is the last it saw.
        seconds: since the job was submitted.
        preview: JPEG, or empty.
    """

    number: int
    stage: str
    step: int
    step_count: int
    seconds: float
    preview: bytes


#: Of a job that has not reported anything here.
NOTHING_YET = Event(number=0, stage="", step=0, step_count=0, seconds=0.0, preview=b"")


class Watching:
    """Recent events of recent jobs; safe in threads.

    Args:
        start: number of this start of the store, more than that of any before.
    """

    def __init__(self, start: int) -> None:
        self._number = start * _NUMBERS
        self._lock = threading.Lock()
        self._events: OrderedDict[str, list[Event]] = OrderedDict()

    def report(self, job_id: str, stage: str, step: int, step_count: int, seconds: float, preview: bytes) -> None:
        with self._lock:
            self._number += 1
            events = self._events.setdefault(job_id, [])
            events.append(Event(self._number, stage, step, step_count, seconds, preview))
            del events[:-_EVENTS]
            self._events.move_to_end(job_id)
            while len(self._events) > _JOBS:
                self._events.popitem(last=False)

    def since(self, job_id: str, cursor: int) -> list[Event]:
        """What the job has reported after the event of number `cursor`."""
        with self._lock:
            return [event for event in self._events.get(job_id, ()) if event.number > cursor]

    def latest(self, job_id: str) -> Event:
        """The last thing that the job has reported."""
        with self._lock:
            return self._events.get(job_id, [NOTHING_YET])[-1]

    def forget(self, job_id: str) -> None:
        with self._lock:
            self._events.pop(job_id, None)
