"""Notices that a server or one of its model processes has died, and restarts it, not too often.

Triton 2.51 goes on without a model process that died: the model stays READY and each of its requests fails. Such a
process stays a zombie, because Triton reaps model processes only when it unloads their models.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from turbo_backend.errors import Misconfigured
from turbo_backend.server.supervisor import child_states

logger = logging.getLogger(__name__)

#: Restarts are counted over this many seconds.
PERIOD_SECONDS = 600.0
#: Two looks pass before a death counts: still sooner than the second in which Triton answers the request that died.
LOOK_SECONDS = 0.25
#: Pause before a restart that follows one that failed, doubled each time.
_RETRY_SECONDS = 1.0
_COMMAND_START = "triton_python_b"


class ModelProcesses:
    """The processes that run the Python models of one tritonserver.

    Args:
        server_pid: the tritonserver; of one that is ready, each process's model is known before it can die.
    """

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._names: dict[int, str] = {}
        self._suspects: set[int] = set()
        self.find_dead()

    def find_dead(self, *, starting: bool = False) -> str | None:
        """What died, in words, or None; to be called every `LOOK_SECONDS`.

        A process counts as dead when two calls in a row find it a zombie: Triton itself waits for those it unloads.

        Args:
            starting: of a server that is not ready yet, of which only signals count. Triton 2.51 may wait for ever for
                such a process; of one that ends by itself it knows the reason, and tells it.
        """
        states = child_states(self._server_pid)
        zombies = {pid for pid, state in states.items() if state == "Z"}
        for pid in states.keys() - zombies - self._names.keys():
            name = _model_name(pid)
            if name is not None:
                self._names[pid] = name
        dead = zombies & self._suspects
        self._suspects = zombies
        for pid in sorted(dead):
            command, status = _read_stat(pid)
            if (pid in self._names or command == _COMMAND_START) and (os.WIFSIGNALED(status) or not starting):
                return self._describe(pid, status)
        if states:  # else the server itself has ended, and `find_among` may be asked whose processes went before it
            self._names = {pid: name for pid, name in self._names.items() if pid in states}
        return None

    def find_among(self, statuses: Mapping[int, int]) -> str | None:
        """Which of these processes, with statuses as `waitpid` gives them, was a model's, in words, or None."""
        return next((self._describe(pid, status) for pid, status in statuses.items() if pid in self._names), None)

    def _describe(self, pid: int, status: int) -> str:
        return f"the process of model {self._names.get(pid, 'unknown')!r} (pid {pid}) died{_cause(status)}"


class Watchdog:
    """A thread that looks after one server until told to stop, or until it gives up.

    Args:
        find_failure: what is wrong with the server, in words, or None.
        restart: stops what is left and starts the server anew; returns when it is ready.
        give_up: stops what is left, for good.
        limit: restarts within `PERIOD_SECONDS`; at the next failure the watchdog gives up.
        stopping: set by `stop`, so that a restart in progress may end early with `Misconfigured`.

    Attributes:
        ended: set when nobody looks after the server any more.
    """

    def __init__(
        self,
        *,
        find_failure: Callable[[], str | None],
        restart: Callable[[], None],
        give_up: Callable[[], object],
        limit: int,
        stopping: threading.Event,
    ) -> None:
        self.ended = threading.Event()
        self._stopping = stopping
        self._find_failure = find_failure
        self._restart = restart
        self._give_up = give_up
        self._limit = limit
        self._restarts: deque[float] = deque()
        self._thread = threading.Thread(target=self._run, name="triton-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; a restart in progress gives up."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(LOOK_SECONDS):
                failure = self._find_failure()
                if failure is not None and not self._recover(failure):
                    self._give_up()
                    return
        finally:
            self.ended.set()

    def _recover(self, failure: str) -> bool:
        """Restarts until that works; False when the limit does not let it."""
        pause = 0.0
        while True:
            while self._restarts and time.monotonic() - self._restarts[0] > PERIOD_SECONDS:
                self._restarts.popleft()
            count = len(self._restarts)
            if count >= self._limit:
                after = f" after {count} restarts in {PERIOD_SECONDS / 60:.0f} minutes" if count else ""
                logger.error("%s; giving up%s", failure, after)
                return False
            logger.warning("%s; restarting tritonserver (%d of at most %d)", failure, count + 1, self._limit)
            self._restarts.append(time.monotonic())
            if self._stopping.wait(pause):
                return True
            try:
                self._restart()
            except Misconfigured as error:
                if self._stopping.is_set():
                    return True
                failure = str(error)
                pause = 2 * pause or _RETRY_SECONDS
            else:
                return True


def _model_name(pid: int) -> str | None:
    """`denoiser` of `.../triton_python_backend_stub .../denoiser/1/model.py ... denoiser_0_0 DEFAULT`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    if not os.path.basename(words[0]).startswith(_COMMAND_START) or len(words) < 2:
        return None  # between fork and exec it is still the server
    return Path(words[1]).parent.parent.name


def _read_stat(pid: int) -> tuple[str, int]:
    """Command and exit status, as `waitpid` gives it, of a zombie; ("", 0) when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    head, _, rest = stat.rpartition(")")
    return head.partition("(")[2], int(rest.split()[-1])


def _cause(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f" with status {code}"
    return f" of {signal.Signals(-code).name}"
