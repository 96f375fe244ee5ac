"""Names: what a job may be called, and what its files in the store are."""

from __future__ import annotations

import re

from turbo_backend.errors import InvalidArgument
from turbo_backend.jobs.storage import Storage

#: Folders of the store.
JOBS, STEPS = "jobs", "steps"
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TOKEN = re.compile(r"[0-9a-f]{16}")


def check_job_id(value: object) -> str:
    """A job's id as given.

    Raises:
        InvalidArgument: it could not name a file everywhere.
    """
    if not isinstance(value, str) or not _JOB_ID.fullmatch(value):
        raise InvalidArgument("JOB_ID", value, "1 to 64 letters, digits, '-' and '_', the first a letter or digit")
    return value


def job_of_request(request_id: str) -> str:
    """The job that a request to the ensemble runs, by the request's id; empty where no job's request has that id."""
    job_id, _, token = request_id.partition(".")
    return job_id if _JOB_ID.fullmatch(job_id) and _TOKEN.fullmatch(token) else ""


def job_folder(job_id: str) -> str:
    return f"{JOBS}/{job_id}"


def request_name(job_id: str) -> str:
    """Name of the file that holds what a job asks for; the job exists once this file does."""
    return f"{JOBS}/{job_id}/request"


def step_folder(request_id: str) -> str:
    return f"{STEPS}/{request_id}"


def step_name(request_id: str, step: int) -> str:
    return f"{STEPS}/{request_id}/{step}"


def finished_steps(storage: Storage, request_id: str) -> list[int]:
    """Numbers of the steps kept of a request, ascending."""
    numbers = [name.rpartition("/")[2] for name in storage.sizes(step_folder(request_id))]
    return sorted(int(number) for number in numbers if number.isdecimal())
