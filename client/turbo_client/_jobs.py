"""Durable jobs without I/O: calls of the server's `jobs` model as messages, and what it answers."""

from __future__ import annotations

import math
import secrets
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import grpc
import numpy as np

from turbo_client._errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    MalformedResponseError,
    RpcStatus,
    TurboDiffusionError,
    UnavailableError,
    UnreachableError,
    error_from_status,
)
from turbo_client._generation import Pace, Progress
from turbo_client._protocol import InferRequest
from turbo_client._requests import GenerationRequest, add_input
from turbo_client._responses import Malformed, StageResponse, Tensor, read_bytes, read_report, read_tensors, read_text
from turbo_client._settings import RetryPolicy
from turbo_client._video import Video

#: The server's model, and the inputs that it takes besides those of the ensembles.
MODEL = "jobs"
INPUTS: Mapping[str, str] = MappingProxyType(
    {"OPERATION": "BYTES", "JOB_ID": "BYTES", "CURSOR": "INT64", "MODEL": "BYTES"}
)
#: Wire type of each output tensor.
OUTPUTS: Mapping[str, str] = MappingProxyType(
    {
        "JOB_ID": "BYTES",
        "STATE": "BYTES",
        "STAGE": "BYTES",
        "STEP": "INT32",
        "STEP_COUNT": "INT32",
        "SEED": "INT64",
        "PRIORITY_LEVEL": "INT32",
        "RESUMES": "INT32",
        "SUBMITTED_AT": "FP64",
        "ENDED_AT": "FP64",
        "VIDEO_BYTES": "INT64",
        "ERROR_CODE": "BYTES",
        "ERROR": "BYTES",
        "EVENT_STAGE": "BYTES",
        "EVENT_STEP": "INT32",
        "EVENT_STEP_COUNT": "INT32",
        "EVENT_SECONDS": "FP64",
        "EVENT_PREVIEW": "BYTES",
        "CURSOR": "INT64",
        "VIDEO": "BYTES",
        "REPORT": "BYTES",
    }
)
_NUMPY = {"INT32": "<i4", "INT64": "<i8", "FP64": "<f8"}
#: Triton's names of statuses that gRPC names otherwise.
_STATUSES = {"INVALID_ARG": "INVALID_ARGUMENT", "UNSUPPORTED": "UNIMPLEMENTED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """How far a job is.

    Attributes:
        job_id: its name.
        state: "queued", "running", "done", "failed", "cancelled", or "interrupted": unfinished, waiting for `resume`.
        stage, step, num_steps: what it reported last; an empty stage before that.
        seed: that its video is made from.
        priority_level: 0, the most urgent, to 9.
        resumes: how often it went on after an interruption.
        submitted_at, ended_at: seconds since 1970 by the server's clock; None before the end.
        video_bytes: size of the finished video.
        error_code, error: why it failed, or why it is tried again; empty otherwise.
    """

    job_id: str
    state: str
    stage: str
    step: int
    num_steps: int
    seed: int
    priority_level: int
    resumes: int
    submitted_at: float
    ended_at: float | None
    video_bytes: int
    error_code: str
    error: str

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens to the job by itself."""
        return self.state in ("done", "failed", "cancelled", "interrupted")

    def failure(self) -> TurboDiffusionError | None:
        """Why an ended job has no video; None for one that has, or may yet."""
        if self.state == "cancelled":
            return CancelledError("the job was cancelled", request_id=self.job_id, code=grpc.StatusCode.CANCELLED)
        if self.state == "interrupted":
            return UnavailableError("the job was interrupted: it waits for `resume`", request_id=self.job_id)
        if self.state == "failed":
            name = _STATUSES.get(self.error_code, self.error_code)
            code = getattr(grpc.StatusCode, name, grpc.StatusCode.UNKNOWN)
            return error_from_status(RpcStatus(code, self.error), request_id=self.job_id)
        return None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A step that a job reported, `seconds` after its submission."""

    stage: str
    step: int
    num_steps: int
    seconds: float
    preview: bytes


@dataclass(frozen=True, slots=True)
class JobsAnswer:
    """An answer of the `jobs` model; `video` is there once the job is done and its result was asked for."""

    jobs: tuple[JobStatus, ...]
    events: tuple[JobEvent, ...]
    cursor: int
    video: Video | None

    @property
    def job(self) -> JobStatus:
        """The one job that was asked about."""
        if len(self.jobs) != 1:
            raise MalformedResponseError(f"the server answered with {len(self.jobs)} jobs where one was asked about")
        return self.jobs[0]


def encode_call(operation: str, *, job_id: str | None = None, cursor: int | None = None) -> Any:
    """A call as a `ModelInferRequest`."""
    message = InferRequest(model_name=MODEL, id=job_id or "")
    for name, value in (("OPERATION", operation), ("JOB_ID", job_id), ("CURSOR", cursor)):
        if value is not None:
            add_input(message, name, INPUTS[name], value)
    return message


def encode_submission(request: GenerationRequest, *, job_id: str, model: str) -> Any:
    """A submission: the request's tensors and parameters, and whom they are for."""
    message = request.encode(model=MODEL, request_id=job_id)
    for name, value in (("OPERATION", "submit"), ("JOB_ID", job_id), ("MODEL", model)):
        add_input(message, name, INPUTS[name], value)
    return message


def choose_job_id(request: GenerationRequest) -> str:
    """The request's id, or one drawn here, so that a submission sent twice names the same job."""
    return request.request_id or secrets.token_hex(8)


def decode_answer(message: Any) -> JobsAnswer:
    """Reads a `ModelInferResponse`.

    Raises:
        MalformedResponseError: it is not what the `jobs` model answers.
    """
    try:
        tensors = read_tensors(message, OUTPUTS)
        rows = _columns(tensors, JobStatus, ended_at=lambda at: at or None)
        events = _columns(tensors, JobEvent, prefix="EVENT_")
        (cursor,) = _numbers(tensors, "CURSOR") or [0]
        video, report = read_bytes(tensors, "VIDEO"), read_report(read_bytes(tensors, "REPORT"))
    except Malformed as error:
        raise MalformedResponseError(f"an answer of model {message.model_name!r} {error}") from None
    made = None
    if video and rows:
        last = rows[0]
        response = StageResponse(last.stage, last.step, last.num_steps, b"", video, None, report)
        made = Video.of(response, request_id=last.job_id)
    return JobsAnswer(tuple(rows), tuple(events), int(cursor), made)


class Wait:
    """One wait for a job, over as many calls and connections as it takes.

    Args:
        job_id: whom to wait for.
        operation: "watch" for its progress, "result" for its video.
        timeout: seconds; None for no limit.
        retries: how fast to come back after a failed call; the number of attempts is not limited here.
        clock: monotonic seconds.
    """

    #: Seconds between two calls: at first, and at most.
    _POLL = (0.1, 1.0)
    #: Failed calls in a row after which an INTERNAL is believed.
    _MAX_INTERNAL = 10

    def __init__(
        self,
        job_id: str,
        operation: str,
        *,
        timeout: float | None,
        retries: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.video: Video | None = None
        self._job: JobStatus | None = None
        self._job_id = job_id
        self._operation = operation
        self._limit = math.inf if timeout is None else timeout
        self._retries = retries
        self._clock = clock
        self._started = clock()
        self._cursor = 0
        self._failures, self._reason = 0, ""
        self._poll = self._POLL[0]
        self._pace = Pace()

    def message(self) -> Any:
        """The next call."""
        return encode_call(self._operation, job_id=self._job_id, cursor=self._cursor)

    def remaining(self) -> float | None:
        """Seconds left for a call; None for no limit."""
        return None if math.isinf(self._limit) else max(0.001, self._started + self._limit - self._clock())

    def receive(self, answer: JobsAnswer) -> list[Progress]:
        """Takes an answer; what is new in it."""
        self._failures, self._reason = 0, ""
        self._poll = self._POLL[0] if answer.events else min(self._POLL[1], self._poll * 1.5)
        self._cursor = max(self._cursor, answer.cursor)
        self.video = answer.video
        self._job = answer.job
        return [
            Progress(
                stage=event.stage,
                step=event.step,
                num_steps=event.num_steps,
                seconds=event.seconds,
                eta_seconds=self._pace.estimate(event.stage, event.step, event.num_steps, event.seconds),
                preview=event.preview or None,
            )
            for event in answer.events
        ]

    def has_ended(self) -> bool:
        """Whether the job has, once what it told was passed on.

        Raises:
            TurboDiffusionError: it ended without a video.
        """
        failure = None if self._job is None else self._job.failure()
        if failure is not None:
            raise failure
        return self._job is not None and self._job.has_ended

    def fail(self, error: TurboDiffusionError) -> None:
        """Takes a failed call; one that the server's absence or haste explains is made again.

        Raises:
            TurboDiffusionError: any other.
        """
        patient = isinstance(error, (UnreachableError, UnavailableError, DeadlineExceededError))
        # A model process that died answers INTERNAL until the launcher has started the server anew.
        if not patient and not (isinstance(error, InternalError) and self._failures < self._MAX_INTERNAL):
            raise error
        self._failures, self._reason = self._failures + 1, f": {error.message}"
        self._poll = self._retries.delay(self._failures)

    def pause(self) -> float:
        """Seconds until the next call.

        Raises:
            DeadlineExceededError: they are not left.
        """
        if self._clock() + self._poll >= self._started + self._limit:
            message = f"the job had not ended within {self._limit:g} s{self._reason}"
            raise DeadlineExceededError(message, request_id=self._job_id)
        return self._poll


def _columns(tensors: dict[str, Tensor], kind: Any, *, prefix: str = "", **changes: Callable[[Any], Any]) -> list[Any]:
    """One object of `kind` for each column of the tensors that its fields name."""
    columns = {}
    for name in kind.__dataclass_fields__:
        wire_name = prefix + {"num_steps": "STEP_COUNT"}.get(name, name.upper())
        if OUTPUTS[wire_name] != "BYTES":
            columns[name] = _numbers(tensors, wire_name)
        elif name == "preview":
            columns[name] = _elements(tensors, wire_name)
        else:
            columns[name] = [read_text(wire_name, element) for element in _elements(tensors, wire_name)]
        if name in changes:
            columns[name] = [changes[name](value) for value in columns[name]]
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise Malformed(f"has {prefix or 'job'} columns of lengths {sorted(lengths)}")
    return [kind(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _numbers(tensors: dict[str, Tensor], name: str) -> list[Any]:
    tensor = tensors.get(name)
    if tensor is None:
        return []
    dtype = np.dtype(_NUMPY[tensor.datatype])
    if math.prod(tensor.shape) * dtype.itemsize != len(tensor.content):
        raise Malformed(f"has {name} of shape {list(tensor.shape)} in {len(tensor.content)} bytes")
    values: list[Any] = np.frombuffer(tensor.content, dtype).tolist()
    return values


def _elements(tensors: dict[str, Tensor], name: str) -> list[bytes]:
    """The elements of a BYTES tensor."""
    tensor = tensors.get(name)
    found: list[bytes] = []
    if tensor is None:
        return found
    position, content = 0, tensor.content
    while position < len(content):
        if position + 4 > len(content):
            raise Malformed(f"has {name} cut short")
        (length,) = struct.unpack_from("<I", content, position)
        if position + 4 + length > len(content):
            raise Malformed(f"has {name} cut short")
        found.append(content[position + 4 : position + 4 + length])
        position += 4 + length
    if len(found) != math.prod(tensor.shape):
        raise Malformed(f"has {name} of shape {list(tensor.shape)} with {len(found)} elements")
    return found
