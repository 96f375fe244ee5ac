"""All jobs of one store: held in memory, and on disk in an order that no crash can spoil.

    lock                     held by the process that runs the jobs (folders of this machine)
    starts                   how often a server has started on this store
    age                      seconds that servers ran on it, for retention
    jobs/JOB_ID/image        the image that the job starts from, written before `request`
    jobs/JOB_ID/request      what it asks for; the job exists once this file does
    jobs/JOB_ID/progress     how far it is; absent: queued
    jobs/JOB_ID/video.mp4    the result, written before `progress` says done; the MP4 itself
    jobs/JOB_ID/report.json  the result's REPORT
    steps/REQUEST_ID/STEP    the sampler's states, written by the denoiser (`turbo_backend.jobs.steps`)

A `progress` that cannot be read is as good as none: the job runs again, from its last step, to the same bytes. A
`request` that cannot be read makes the job failed, and says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from turbo_backend.errors import TurboError
from turbo_backend.jobs.names import JOBS, STEPS, finished_steps, job_folder, job_of_request, request_name, step_folder
from turbo_backend.jobs.records import (
    Corrupt,
    Job,
    JobProgress,
    JobRequest,
    JobState,
    seal,
    unseal,
)
from turbo_backend.jobs.storage import Storage

_log = logging.getLogger(__name__)


class JobStore:
    """The jobs of a storage; safe in threads. One process at a time, see `Storage.lock`.

    Args:
        storage: where they are kept.
        monotonic: seconds that never go back.
        clock: seconds since 1970, shown to people.

    Attributes:
        start: number of this start of the store.

    Raises:
        TurboError: the storage does not work.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._storage = storage
        self._monotonic = monotonic
        self._clock = clock
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        storage.clean()
        names = storage.sizes(JOBS)
        for job_id in sorted({name.split("/")[1] for name in names}):
            if request_name(job_id) in names:
                self._jobs[job_id] = self._load(job_id)
            else:  # submitting it was cut short, so nobody was told that it exists
                storage.delete(job_folder(job_id))
        self._next_sequence = 1 + max((job.request.sequence for job in self._jobs.values()), default=0)
        ages = [job.progress.ended_age or 0.0 for job in self._jobs.values()]
        self._first_age = max([self._stored_number("age"), *ages]) - monotonic()
        self._sizes = self._measure()
        self.start = 1 + int(self._stored_number("starts"))
        storage.write("starts", f"{self.start}\n".encode("ascii"))

    @property
    def age(self) -> float:
        """Seconds that servers ran on this store: no clock that is set, and no night without a server, changes it."""
        return self._first_age + self._monotonic()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes kept of each job, by id, as of the last `tidy` and what has been written since."""
        with self._lock:
            return dict(self._sizes)

    @property
    def num_bytes(self) -> int:
        """Bytes kept of all jobs."""
        with self._lock:
            return sum(self._sizes.values())

    def all(self) -> list[Job]:
        """Every job, in the order of submission."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: job.request.sequence)

    def get(self, job_id: str) -> Job | None:
        with self._lock:
            return self._jobs.get(job_id)

    def add(self, request: JobRequest, image: bytes | None) -> Job:
        """Keeps a new job, under the next sequence number and the present time."""
        with self._lock:
            job = Job(dataclasses.replace(request, sequence=self._next_sequence, submitted_at=self._clock()))
            if image is not None:
                self._storage.write(f"{job_folder(job.job_id)}/image", image)
            content = seal(job.request)
            self._storage.write(request_name(job.job_id), content)
            self._next_sequence += 1
            self._sizes[job.job_id] = len(image or b"") + len(content)
            self._jobs[job.job_id] = job
            return job

    def change(self, job_id: str, **changes: Any) -> Job:
        """Changes fields of a job's progress. A failed write leaves the job as it was."""
        with self._lock:
            job = self._jobs[job_id]
            progress = dataclasses.replace(job.progress, **changes)
            if progress.state.is_final and not job.state.is_final:
                progress = dataclasses.replace(progress, ended_at=self._clock(), ended_age=self.age)
            self._storage.write(f"{job_folder(job_id)}/progress", seal(progress))
            changed = self._jobs[job_id] = Job(job.request, progress)
            return changed

    def finish(self, job_id: str, video: bytes, report: str) -> Job:
        """Keeps a job's result, then says that it is done; its steps are no longer needed."""
        self._storage.write(f"{job_folder(job_id)}/report.json", report.encode("utf-8"))
        self._storage.write(f"{job_folder(job_id)}/video.mp4", video)
        checksum = hashlib.sha256(video).hexdigest()
        with self._lock:
            self._sizes[job_id] += len(video) + len(report)
        job = self.change(
            job_id,
            state=JobState.DONE,
            video_bytes=len(video),
            video_sha256=checksum,
            error_code="",
            error="",
        )
        try:
            self._storage.delete(step_folder(job.request.request_id))
        except TurboError as error:  # retention will try again
            _log.warning("the steps of finished job %s stay for now: %s", job_id, error)
        return job

    def result(self, job: Job) -> tuple[bytes, str]:
        """(MP4, REPORT as JSON) of a job that is done.

        Raises:
            Corrupt: they are not what was stored.
        """
        video = self._storage.read(f"{job_folder(job.job_id)}/video.mp4")
        report = self._storage.read(f"{job_folder(job.job_id)}/report.json")
        if video is None or report is None or hashlib.sha256(video).hexdigest() != job.progress.video_sha256:
            raise Corrupt("the stored video is gone or damaged")
        return video, report.decode("utf-8")

    def image(self, job: Job) -> bytes | None:
        """The image that a job starts from, None for a job without.

        Raises:
            Corrupt: it is not what was stored.
        """
        if job.request.image_sha256 is None:
            return None
        image = self._storage.read(f"{job_folder(job.job_id)}/image")
        if image is None or hashlib.sha256(image).hexdigest() != job.request.image_sha256:
            raise Corrupt("the stored image is gone or damaged")
        return image

    def remove(self, job_id: str) -> None:
        """Forgets a job: first `request`, so that a removal cut short leaves no job behind."""
        with self._lock:
            job = self._jobs[job_id]
            self._storage.delete(request_name(job_id))
            del self._jobs[job_id]
            self._sizes.pop(job_id, None)
        self._storage.delete(job_folder(job_id))
        self._storage.delete(step_folder(job.request.request_id))

    def finished_steps(self, job: Job) -> int:
        """Denoising steps of a job that are kept."""
        return max(finished_steps(self._storage, job.request.request_id), default=0)

    def tidy(self) -> None:
        """Removes the steps of requests that are no job's, and writes down the store's age."""
        with self._lock:
            known = {job.request.request_id for job in self._jobs.values() if job.state is not JobState.DONE}
        for request_id in {name.split("/")[1] for name in self._storage.sizes(STEPS)} - known:
            job = self.get(job_of_request(request_id))
            if job is None or job.request.request_id != request_id or job.state is JobState.DONE:
                self._storage.delete(step_folder(request_id))
        self._storage.write("age", f"{self.age:.0f}\n".encode("ascii"))
        sizes = self._measure()
        with self._lock:
            self._sizes = {job_id: sizes.get(job_id, 0) for job_id in self._jobs}

    def _measure(self) -> dict[str, int]:
        """Bytes that the storage holds of each job, by id."""
        with self._lock:
            owners = {job.request.request_id: job.job_id for job in self._jobs.values()}
            found = dict.fromkeys(self._jobs, 0)
        for name, size in (self._storage.sizes(JOBS) | self._storage.sizes(STEPS)).items():
            folder, owner = name.split("/")[:2]
            owner = owner if folder == JOBS else owners.get(owner, "")
            if owner in found:
                found[owner] += size
        return found

    def _load(self, job_id: str) -> Job:
        try:
            request = unseal(JobRequest, self._storage.read(request_name(job_id)) or b"")
        except Corrupt as error:
            _log.error("job %s is lost: its request file cannot be read: %s", job_id, error)
            return _unreadable(job_id, error)
        content = self._storage.read(f"{job_folder(job_id)}/progress")
        if content is None:
            return Job(request)
        try:
            return Job(request, unseal(JobProgress, content))
        except Corrupt as error:
            _log.warning("job %s runs again: its progress file cannot be read: %s", job_id, error)
            return Job(request)

    def _stored_number(self, name: str) -> float:
        """One of the store's own numbers; 0 when it cannot be read, which costs watchers or retention little."""
        try:
            return max(0.0, float(self._storage.read(name) or 0))
        except ValueError:
            return 0.0


def _unreadable(job_id: str, error: Corrupt) -> Job:
    """A failed job in place of one whose request file is damaged, so that nothing vanishes without a word."""
    request = JobRequest(
        job_id=job_id,
        token="0" * 16,
        sequence=0,
        model="",
        values={},
        image_sha256=None,
        fps=0,
        preview=False,
        priority_level=5,
        identity="",
        submitted_at=0.0,
    )
    message = f"the job's request file cannot be read: {error}"
    return Job(request, JobProgress(state=JobState.FAILED, error_code="INTERNAL", error=message, ended_age=0.0))
