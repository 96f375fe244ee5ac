"""Ends a process in which no Python thread can run any more, so that whoever looks after it can start it anew.

Triton 2.51 can bring that about where several threads take the responses of ensembles: one has been given a response
and waits for the interpreter's lock, one has that lock and waits for the table of responses, and Triton's own thread
has the table and waits for the first. Such a process is neither dead nor of any use.
"""

from __future__ import annotations

import faulthandler
import threading


class StandstillGuard:
    """Puts off, from a thread of its own, the end of this process; needs no Python to bring it about.

    The end is exit status 1, with all threads' tracebacks on standard error.

    Args:
        seconds: without any Python thread running, until the end.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._put_off, name="standstill-guard", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets the process stand still as long as it likes."""
        self._ended.set()
        self._thread.join()

    def _put_off(self) -> None:
        while True:
            faulthandler.dump_traceback_later(self._seconds, exit=True)
            if self._ended.wait(self._seconds / 4):
                faulthandler.cancel_dump_traceback_later()
                return
