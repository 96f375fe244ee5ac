"""Runs the jobs of a store: a bounded number at a time, the rest waiting on disk in their order."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from turbo_backend.errors import AlreadyExists, NotFound, ResourceExhausted, TurboError, Unavailable
from turbo_backend.jobs.outcome import AttemptFailed, Verdict, judge
from turbo_backend.jobs.queue import JobQueue
from turbo_backend.jobs.records import Corrupt, Job, JobRequest, JobState
from turbo_backend.jobs.retention import choose_expired
from turbo_backend.jobs.store import JobStore
from turbo_backend.jobs.watching import Watching

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One answer of the ensemble; the last one has a video and its report."""

    stage: str
    step: int
    step_count: int
    preview: bytes = b""
    video: bytes = b""
    report: str = ""


#: Runs a job's request through the ensemble; raises AttemptFailed.
Generate = Callable[[JobRequest, "bytes | None"], Iterable[Update]]


class Cancels(Protocol):
    """The part of `turbo_backend.cancellation.Cancellations` that is used here."""

    def request(self, key: str) -> None: ...
    def forget(self, *keys: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a deployment allows.

    Attributes:
        concurrency: jobs given to the ensemble at a time.
        max_attempts: starts of a job, each ended by the server's death, without a further step finished between them.
        resume: go on with unfinished jobs at the start by itself.
        max_age: seconds that a finished job is kept.
        max_bytes: what all jobs together may take.
    """

    concurrency: int
    max_attempts: int
    resume: bool
    max_age: float
    max_bytes: int


class JobRunner:
    """The jobs of one store, running. All methods are safe in threads.

    Args:
        store: of this process alone.
        generate: runs one job.
        cancels: how a running one is told to end.
        limits: the deployment's.
        count: told of each `resume` and `cancel` and of the job's ensemble, for metrics.
    """

    def __init__(
        self, store: JobStore, generate: Generate, cancels: Cancels, limits: Limits, count: Callable[[str, str], None]
    ) -> None:
        self.watching = Watching(store.start)
        self._store = store
        self._generate = generate
        self._cancels = cancels
        self._limits = limits
        self._count = count
        self._queue = JobQueue()
        self._changed = threading.Condition()
        self._cancelling: set[str] = set()
        self._running: dict[str, Job] = {}
        self._stopping = False
        self._recover()
        self._threads = [
            threading.Thread(target=self._run_forever, name=f"job-{number}", daemon=True)
            for number in range(limits.concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: JobRequest, image: bytes | None) -> Job:
        """Queues a job; one that exists already with the same request is answered as it is.

        Raises:
            AlreadyExists: the id belongs to a job that asks for something else.
            TurboError: the store is full or does not work.
        """
        with self._changed:
            job = self._store.get(request.job_id)
            if job is not None:
                if job.request.identity != request.identity:
                    raise AlreadyExists(
                        f"JOB_ID = {request.job_id!r}: is a job with other parameters, submitted before this one"
                    )
                return job
            if self._stopping:
                raise Unavailable("the server is stopping: submit again once it is back")
            self._make_room(len(image or b""))
            job = self._store.add(request, image)
            self._queue.put(job.request)
            self._changed.notify()
            return job

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        job = self._store.get(job_id)
        if job is None:
            raise NotFound(f"JOB_ID = {job_id!r}: no such job; it was never submitted, deleted, or its time was over")
        return job

    def list(self, cursor: int, limit: int) -> list[Job]:
        """At most `limit` jobs with sequence numbers over `cursor`, in the order of submission."""
        return [job for job in self._store.all() if job.request.sequence > cursor][:limit]

    def result(self, job_id: str) -> tuple[Job, bytes, str]:
        """(job, MP4, REPORT as JSON); both empty while the job is not done.

        Raises:
            Unavailable: the stored video was damaged; the job runs again, to the same bytes.
        """
        job = self.get(job_id)
        if job.state is not JobState.DONE:
            return job, b"", ""
        try:
            return (job, *self._store.result(job))
        except Corrupt as error:
            with self._changed:
                if self.get(job_id).state is JobState.DONE:
                    self._enqueue(self._store.change(job_id, state=JobState.QUEUED, attempts=0))
            raise Unavailable(f"job {job_id!r}: {error}; it is made again, wait for it") from None

    def cancel(self, job_id: str) -> Job:
        """Cancels a queued job at once, and tells a running one to end within a step; others stay as they are."""
        with self._changed:
            job = self.get(job_id)
            if job_id in self._running:
                self._cancelling.add(job_id)
                self._cancels.request(job.request.request_id)
            elif not job.state.is_final:
                job = self._store.change(job_id, state=JobState.CANCELLED)
                self._queue.remove(job_id)
                self._count("cancel", job.request.model)
            return job

    def resume(self, job_id: str) -> Job:
        """Goes on with a job that was interrupted, cancelled or failed, after its last finished step."""
        with self._changed:
            job = self.get(job_id)
            if job.state in (JobState.INTERRUPTED, JobState.CANCELLED, JobState.FAILED) and job.request.model:
                changed = self._store.change(
                    job_id,
                    state=JobState.QUEUED,
                    attempts=0,
                    resumes=job.progress.resumes + 1,
                    error_code="",
                    error="",
                    ended_at=None,
                    ended_age=None,
                )
                self._enqueue(changed)
                self._count("resume", job.request.model)
            return self.get(job_id)

    def delete(self, job_id: str) -> Job:
        """Forgets a job that is not queued or running.

        Raises:
            Unavailable: it is.
        """
        with self._changed:
            job = self.get(job_id)
            if job.state in (JobState.QUEUED, JobState.RUNNING):
                raise Unavailable(f"job {job_id!r} is {job.state.value}: cancel it first")
            self._store.remove(job_id)
            self.watching.forget(job_id)
            return job

    def tidy(self) -> None:
        """Forgets the jobs whose time is over and what no job owns; to be called now and then.

        Raises:
            TurboError: the store does not work.
        """
        self._store.tidy()
        self._expire()

    def counts(self) -> Mapping[JobState, int]:
        """Number of jobs in each state."""
        found = dict.fromkeys(JobState, 0)
        for job in self._store.all():
            found[job.state] += 1
        return found

    def num_bytes(self) -> int:
        """What all jobs take, as far as this process knows; `tidy` looks at what the denoiser wrote."""
        return self._store.num_bytes

    def stop(self) -> None:
        """Starts no more jobs and ends the running ones; both go on with the next start. Returns at once."""
        with self._changed:
            self._stopping = True
            for job in self._running.values():
                self._cancels.request(job.request.request_id)
            self._changed.notify_all()

    def join(self) -> None:
        """Waits until what `stop` ended has ended."""
        for thread in self._threads:
            thread.join()

    def _recover(self) -> None:
        """Finds the jobs that an earlier server left unfinished."""
        for job in self._store.all():
            if job.state is JobState.QUEUED:
                self._queue.put(job.request)
            elif job.state is JobState.RUNNING:
                # A job that takes the server down each time must not do so for ever.
                finished = self._store.finished_steps(job)
                attempts = 0 if finished > job.progress.finished_steps else job.progress.attempts
                goes_on = self._limits.resume and attempts < self._limits.max_attempts
                self._store.change(
                    job.job_id,
                    state=JobState.QUEUED if goes_on else JobState.INTERRUPTED,
                    attempts=attempts,
                    resumes=job.progress.resumes + goes_on,
                )
                if goes_on:
                    self._queue.put(job.request)
                    self._count("resume", job.request.model)
                else:
                    _log.warning("job %s was interrupted (attempt %d) and waits for `resume`", job.job_id, attempts)

    def _enqueue(self, job: Job) -> None:
        self._cancelling.discard(job.job_id)
        self._cancels.forget(job.request.request_id)
        self._queue.put(job.request)
        self._changed.notify()

    def _run_forever(self) -> None:
        while (job := self._take()) is not None:
            try:
                self._run(job)
            except Exception as error:  # one job's trouble must not end the thread, nor lose the job
                _log.exception("job %s is tried again", job.job_id)
                self._put_back(job, str(error))
            finally:
                self._leave(job)

    def _take(self) -> Job | None:
        """The next job, marked as running; None once the runner stops."""
        with self._changed:
            while not self._stopping:
                job_id = self._queue.take()
                if job_id is None:
                    self._changed.wait(self._queue.pause())
                    continue
                job = self._running[job_id] = self.get(job_id)
                return job
            return None

    def _run(self, job: Job) -> None:
        """One attempt."""
        job_id = job.job_id
        try:
            self._store.change(
                job_id,
                state=JobState.RUNNING,
                attempts=job.progress.attempts + 1,
                finished_steps=self._store.finished_steps(job),
            )
            update = None
            for update in self._generate(job.request, self._store.image(job)):
                seconds = max(0.0, time.time() - job.request.submitted_at)
                self.watching.report(job_id, update.stage, update.step, update.step_count, seconds, update.preview)
            if update is None or not update.video:
                raise AttemptFailed("INTERNAL", "the ensemble ended without a video")
            self._store.finish(job_id, update.video, update.report)
        except AttemptFailed as failure:
            self._judge(job, failure)
        except Corrupt as error:
            self._store.change(job_id, state=JobState.FAILED, error_code="INTERNAL", error=str(error))
        except TurboError as error:  # of the store, which may have room again later
            _log.warning("job %s is tried again: %s", job_id, error)
            self._put_back(job, str(error))
        else:
            with self._changed:
                self._queue.remove(job_id)

    def _leave(self, job: Job) -> None:
        """Ends an attempt, with the cancellation that was meant for it; another thread may run the job again by now."""
        with self._changed:
            if self._running.get(job.job_id) is job:
                del self._running[job.job_id]
                self._cancelling.discard(job.job_id)
                self._cancels.forget(job.request.request_id)

    def _judge(self, job: Job, failure: AttemptFailed) -> None:
        job_id = job.job_id
        with self._changed:
            if self._stopping and job_id not in self._cancelling:
                state = JobState.QUEUED if self._limits.resume else JobState.INTERRUPTED
                self._store.change(job_id, state=state, attempts=0)
                return
            verdict = judge(failure, failures=self._queue.failures(job_id))
            if verdict is Verdict.RETRY and job_id not in self._cancelling:
                _log.warning("job %s is tried again: %s: %s", job_id, failure.code, failure.message)
                self._put_back(job, failure.message)
                return
            if verdict is Verdict.FAIL:
                self._store.change(job_id, state=JobState.FAILED, error_code=failure.code, error=failure.message)
            else:
                self._store.change(job_id, state=JobState.CANCELLED)
                self._count("cancel", job.request.model)
            self._queue.remove(job_id)

    def _put_back(self, job: Job, reason: str) -> None:
        """Lets a job wait and run again. Its file goes on saying that it runs, should it not take another state now."""
        with self._changed:
            self._leave(job)
            self._queue.put_back(job.request)
            try:
                self._store.change(job.job_id, state=JobState.QUEUED, attempts=0, error=reason)
            except TurboError as error:
                _log.warning("job %s: %s", job.job_id, error)
            self._changed.notify()

    def _make_room(self, num_bytes: int) -> None:
        """Forgets finished jobs so that a new one fits.

        Raises:
            ResourceExhausted: the jobs that are not finished fill the store.
        """
        if self._store.num_bytes + num_bytes <= self._limits.max_bytes:
            return
        self._expire(num_bytes)
        taken = self._store.num_bytes + num_bytes
        if taken > self._limits.max_bytes:
            raise ResourceExhausted(
                f"the job store would hold {taken} bytes of unfinished jobs, of {self._limits.max_bytes} allowed"
            )

    def _expire(self, wanted: int = 0) -> None:
        with self._changed:
            expired = choose_expired(
                self._store.all(),
                self._store.sizes,
                age=self._store.age,
                max_age=self._limits.max_age,
                max_bytes=self._limits.max_bytes - wanted,
            )
            for job_id in expired:
                self._store.remove(job_id)
                self.watching.forget(job_id)


def draw_job_id() -> str:
    """An id for a job whose client has none of its own."""
    return secrets.token_hex(8)
