"""The life of a server's jobs: opened once the store is free, tidied while they run, stopped before the server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from turbo_backend.cancellation import STOPPING, Cancellations
from turbo_backend.errors import TurboError, Unavailable, Unsupported
from turbo_backend.jobs.runner import Generate, JobRunner, Limits
from turbo_backend.jobs.storage import open_storage
from turbo_backend.jobs.store import JobStore
from turbo_backend.settings import PREFIX, Settings

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_TIDY_SECONDS = 60.0
#: After a store that does not work; a lock is looked for with every look.
_RETRY_SECONDS = 5.0


class JobsLifecycle:
    """Opens the job store of a server and looks after it in a thread of its own.

    A store that another server holds, or that does not work, keeps this server's jobs away, not the server: each call
    gets the reason, until the store can be had.

    Args:
        settings: the server's.
        generate: runs one job.
        cancels: the server's cancellations.
        count: told of each `resume` and `cancel` and of the job's ensemble.
        observe: told of the runner about once a second, for metrics.
    """

    def __init__(
        self,
        settings: Settings,
        generate: Generate,
        cancels: Cancellations,
        count: Callable[[str, str], None],
        observe: Callable[[JobRunner], None],
    ) -> None:
        self._location = settings.job_store_location
        self._generate = generate
        self._cancels = cancels
        self._count = count
        self._observe = observe
        self._limits = Limits(
            concurrency=settings.job_concurrency,
            max_attempts=settings.job_attempts,
            resume=settings.job_resume,
            max_age=settings.job_max_age_hours * 3600.0,
            max_bytes=settings.job_max_bytes,
        )
        self._runner: JobRunner | None = None
        self._reason: TurboError = Unsupported(f"this server keeps no jobs: {PREFIX}JOB_STORE is none")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self._location is not None:
            self._open()
            self._thread = threading.Thread(target=self._look_after, name="jobs-lifecycle", daemon=True)
            self._thread.start()

    def runner(self) -> JobRunner:
        """The jobs.

        Raises:
            TurboError: why there are none.
        """
        if self._runner is None:
            raise self._reason
        return self._runner

    def stop(self) -> None:
        """Ends the running jobs, which go on with the next start, and waits for that."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._runner is not None:
            self._runner.stop()
            self._runner.join()

    def _open(self) -> bool:
        """Takes the store if it is free; False when it does not work."""
        assert self._location is not None
        try:
            storage = open_storage(self._location)
            if storage.lock():
                runner = JobRunner(JobStore(storage), self._generate, self._cancels, self._limits, self._count)
                runner.tidy()
                self._runner = runner
            else:
                self._reason = Unavailable(f"the job store {self._location} is in use by another server")
        except TurboError as error:
            if str(error) != str(self._reason):
                _log.warning("no jobs for now: %s", error)
            self._reason = error
            return False
        return True

    def _look_after(self) -> None:
        pause, tidied = _LOOK_SECONDS, time.monotonic()
        while not self._ended.wait(pause):
            pause = _LOOK_SECONDS
            if self._runner is None:
                pause = _LOOK_SECONDS if self._open() else _RETRY_SECONDS
                continue
            if self._cancels.is_requested(STOPPING):
                self._runner.stop()
                return
            self._observe(self._runner)
            if time.monotonic() - tidied >= _TIDY_SECONDS:
                tidied = time.monotonic()
                try:
                    self._runner.tidy()
                except TurboError as error:
                    _log.warning("the job store could not be tidied: %s", error)
