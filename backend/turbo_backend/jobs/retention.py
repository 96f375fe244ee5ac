"""Which finished jobs to forget, by age and by bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from turbo_backend.jobs.records import Job


def choose_expired(
    jobs: Sequence[Job], sizes: Mapping[str, int], *, age: float, max_age: float, max_bytes: int
) -> list[str]:
    """Ids of the finished jobs to forget, longest finished first; never of a job that is not finished.

    Args:
        jobs: all jobs of the store.
        sizes: bytes kept of each, by id.
        age: of the store, see `JobStore.age`.
        max_age: seconds that a finished job is kept.
        max_bytes: what all jobs together may take.
    """
    finished = [job for job in jobs if job.state.is_final]
    finished.sort(key=lambda job: (job.progress.ended_age or 0.0, job.request.sequence))
    total = sum(sizes.get(job.job_id, 0) for job in jobs)
    expired = []
    for job in finished:
        if age - (job.progress.ended_age or 0.0) > max_age or total > max_bytes:
            expired.append(job.job_id)
            total -= sizes.get(job.job_id, 0)
    return expired
