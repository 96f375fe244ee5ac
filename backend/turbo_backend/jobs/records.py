"""What a job is: what it asks for, which never changes, and how far it is, which does.

Both are JSON files that people can read, sealed with a checksum in their last line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, TypeVar

#: Raised when a file changes its meaning.
_VERSION = 1
_SEAL = b"\nsha256 "

_Record = TypeVar("_Record", "JobRequest", "JobProgress")


class JobState(str, Enum):
    """queued -> running -> done, failed or cancelled; interrupted: unfinished, and waiting for `resume`."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens by itself and retention may take the job."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What a job asks for.

    Attributes:
        job_id: the client's or drawn, see `turbo_backend.jobs.names`.
        token: drawn at submission; tells this job from an earlier one of the same id in every other file's name.
        sequence: number of the job in this store, in the order of submission.
        model: ensemble to run.
        values: wire values by tensor name, defaults filled in, SEED drawn where 0 was asked for.
        image_sha256: of the image, which is a file of its own; None for a job without.
        fps, preview: delivery.
        priority_level: 0, the most urgent, to 9.
        identity: hash of all that decides what the caller gets, as it was asked for.
        submitted_at: seconds since 1970 by the server's clock, for people; nothing is ordered by it.
    """

    job_id: str
    token: str
    sequence: int
    model: str
    values: Mapping[str, Any]
    image_sha256: str | None
    fps: int
    preview: bool
    priority_level: int
    identity: str
    submitted_at: float

    @property
    def seed(self) -> int:
        """The seed that the video is made from."""
        return int(self.values.get("SEED", 0))

    @property
    def request_id(self) -> str:
        """Id of the job's requests to the ensemble, and the name of its finished steps."""
        return f"{self.job_id}.{self.token}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """How far a job is.

    Attributes:
        attempts: how often it was started without a further step finished since.
        finished_steps: denoising steps that were finished when it was last started.
        resumes: how often it went on after an interruption.
        ended_at: seconds since 1970 by the server's clock, for people.
        ended_age: age of the store then, in seconds that a server ran; retention counts from it.
        error_code, error: why it failed.
        video_bytes, video_sha256: of the finished video.
    """

    state: JobState = JobState.QUEUED
    attempts: int = 0
    finished_steps: int = 0
    resumes: int = 0
    ended_at: float | None = None
    ended_age: float | None = None
    error_code: str = ""
    error: str = ""
    video_bytes: int = 0
    video_sha256: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", JobState(self.state))


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the store holds it."""

    request: JobRequest
    progress: JobProgress = field(default_factory=JobProgress)

    @property
    def job_id(self) -> str:
        return self.request.job_id

    @property
    def state(self) -> JobState:
        return self.progress.state


class Corrupt(Exception):
    """A file does not hold what was written to it."""


def identify(model: str, values: Mapping[str, object], image_sha256: str | None, fps: int) -> str:
    """Hash of what decides the video, by which a repeated submission is told from another one."""
    asked = json.dumps([model, dict(values), image_sha256, fps], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8")).hexdigest()


def seal(record: JobRequest | JobProgress) -> bytes:
    """The record's file."""
    text = json.dumps({"version": _VERSION, **asdict(record)}, ensure_ascii=False, indent=1)
    content = text.encode("utf-8")
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode("ascii") + b"\n"


def unseal(kind: type[_Record], content: bytes) -> _Record:
    """The record of a file.

    Raises:
        Corrupt: the checksum does not fit, or the fields are those of another version.
    """
    text, _, checksum = content.rpartition(_SEAL)
    if hashlib.sha256(text).hexdigest().encode("ascii") != checksum.strip():
        raise Corrupt("its checksum does not fit")
    fields = json.loads(text)
    if fields.pop("version", None) != _VERSION:
        raise Corrupt("it is of another version")
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise Corrupt(str(error)) from None
