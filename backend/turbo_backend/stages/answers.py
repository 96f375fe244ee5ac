"""The thread that gives answers, so that the one that runs steps never waits for a caller."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)

#: How often `between` is called while there is something to look after.
_BETWEEN_SECONDS = 0.02


class Answers:
    """Calls what it is given, in order: at once in the caller's thread, or after `start` in a thread of its own.

    Args:
        between: called every 20 ms by the thread while `is_busy()`.
    """

    def __init__(self, *, between: Callable[[], None], is_busy: Callable[[], bool]) -> None:
        self._between = between
        self._is_busy = is_busy
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="answers")
        self._thread.start()

    def give(self, answer: Callable[[], None]) -> None:
        """Has `answer` called; in the thread, an exception of it is logged and harms no other."""
        if self._thread is None:
            answer()
        else:
            self._queue.put(answer)

    def wake(self) -> None:
        """Has the thread, if there is one, look whether it is busy now."""
        if self._thread is not None:
            self._queue.put(self._between)

    def close(self) -> None:
        """Returns when all answers are given and the thread has ended."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                answer = self._queue.get(timeout=_BETWEEN_SECONDS if self._is_busy() else None)
            except queue.Empty:
                answer = self._between
            if answer is None:
                return
            try:
                answer()
            except Exception:
                _log.exception("an answer could not be given")
