"""Answers the calls of the `jobs` model: one operation on one job, or a list of them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from turbo_backend.config import ModelConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.jobs.names import check_job_id
from turbo_backend.jobs.records import Job, JobRequest, identify
from turbo_backend.jobs.runner import JobRunner, draw_job_id
from turbo_backend.jobs.watching import Event
from turbo_backend.parameters import (
    IMAGE_FIELDS,
    MAX_IMAGE_BYTES,
    MAX_PROMPT_BYTES,
    MAX_SEED,
    TEXT_FIELDS,
    check_image_given,
    make_delivery,
    make_parameters,
    make_scheduling,
)

#: Jobs in one answer to `list`.
PAGE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to the `jobs` model.

    Attributes:
        operation: submit, status, watch, result, list, cancel, cancel_request, resume or delete.
        job_id: absent for list, and for a submission without an id of its own.
        cursor: the last event that a watcher saw, or the last sequence number of the page before.
        model: ensemble of a submission; absent for `text_to_video`, or `image_to_video` with an image.
        prompt, image, values: of a submission, as the ensembles take them.
        parameters: request parameters of a submission, on delivery and scheduling.
    """

    operation: str
    job_id: str | None = None
    cursor: int = 0
    model: str | None = None
    prompt: str | None = None
    image: bytes | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model sends back.

    Attributes:
        jobs: the job, or a page of them.
        latest: what each of them has reported last.
        events: what it has reported since the call's cursor (watch).
        cursor: to send with the next call.
        video, report: of a finished job (result).
    """

    jobs: Sequence[Job] = ()
    latest: Sequence[Event] = ()
    events: Sequence[Event] = ()
    cursor: int = 0
    video: bytes = b""
    report: str = ""


class JobService:
    """The operations on jobs.

    Args:
        runner: of the jobs, or raises why there is none.
        models: the networks served, by the name of their ensemble.
        cancel_request: ends a request that is no job, by its id.
    """

    def __init__(
        self, runner: Callable[[], JobRunner], models: Mapping[str, ModelConfig], cancel_request: Callable[[str], None]
    ) -> None:
        self._runner = runner
        self._models = models
        self._cancel_request = cancel_request
        self._operations: dict[str, Callable[[Call], Answer]] = {
            "submit": self._submit,
            "status": lambda call: Answer(jobs=[runner().get(check_job_id(call.job_id))]),
            "watch": self._watch,
            "result": self._result,
            "list": self._list,
            "cancel": lambda call: Answer(jobs=[runner().cancel(check_job_id(call.job_id))]),
            "cancel_request": self._cancel_plain,
            "resume": lambda call: Answer(jobs=[runner().resume(check_job_id(call.job_id))]),
            "delete": lambda call: Answer(jobs=[runner().delete(check_job_id(call.job_id))]),
        }

    def answer(self, call: Call) -> Answer:
        """Carries out one call.

        Raises:
            TurboError: of the kind that says what is wrong with it.
        """
        operation = self._operations.get(call.operation)
        if operation is None:
            raise InvalidArgument("OPERATION", call.operation, f"one of {', '.join(self._operations)}")
        answer = operation(call)
        if not answer.jobs:
            return answer
        watching = self._runner().watching
        return replace(answer, latest=[watching.latest(job.job_id) for job in answer.jobs])

    def _submit(self, call: Call) -> Answer:
        request = make_request(self._models, call)
        return Answer(jobs=[self._runner().submit(request, call.image)])

    def _watch(self, call: Call) -> Answer:
        job = self._runner().get(check_job_id(call.job_id))  # before its events: the last is then among them
        events = self._runner().watching.since(job.job_id, call.cursor)
        return Answer(jobs=[job], events=events, cursor=events[-1].number if events else call.cursor)

    def _result(self, call: Call) -> Answer:
        job, video, report = self._runner().result(check_job_id(call.job_id))
        return Answer(jobs=[job], video=video, report=report)

    def _list(self, call: Call) -> Answer:
        jobs = self._runner().list(call.cursor, PAGE)
        return Answer(jobs=jobs, cursor=jobs[-1].request.sequence if jobs else call.cursor)

    def _cancel_plain(self, call: Call) -> Answer:
        if not call.job_id:
            raise InvalidArgument("JOB_ID", call.job_id, "the id of the request to cancel")
        self._cancel_request(call.job_id)
        return Answer()


def make_request(models: Mapping[str, ModelConfig], call: Call) -> JobRequest:
    """What a submission asks for, checked as the ensemble would, every default filled in.

    Raises:
        InvalidArgument: naming the field, its value and what fits.
    """
    job_id = draw_job_id() if call.job_id is None else check_job_id(call.job_id)
    ensemble = call.model or ("text_to_video" if call.image is None else "image_to_video")
    model = models.get(ensemble)
    if model is None:
        raise InvalidArgument("MODEL", ensemble, f"an ensemble that this server has: {', '.join(models)}")
    if call.prompt is None or not call.prompt.strip():
        raise InvalidArgument("PROMPT", call.prompt, "a description of the video, not empty")
    if len(call.prompt.encode("utf-8")) > MAX_PROMPT_BYTES:
        raise InvalidArgument("PROMPT", f"{len(call.prompt)} characters", f"at most {MAX_PROMPT_BYTES} bytes")
    check_image_given(model, given=call.image is not None)
    if call.image is not None and not 1 <= len(call.image) <= MAX_IMAGE_BYTES:
        raise InvalidArgument("IMAGE", f"{len(call.image)} bytes", f"1 to {MAX_IMAGE_BYTES} bytes")
    delivery = make_delivery(call.parameters)
    if delivery.container != "mp4":
        raise InvalidArgument("container", delivery.container, "mp4: a job keeps no raw frames")
    scheduling = make_scheduling(call.parameters)
    if scheduling.deadline_ms is not None:
        raise InvalidArgument("deadline_ms", scheduling.deadline_ms, "left out: nobody waits on a job's connection")
    checked = make_parameters(model, call.values, seed=1 + secrets.randbelow(MAX_SEED)).to_dict()
    names = (*TEXT_FIELDS, *IMAGE_FIELDS) if model.takes_image else TEXT_FIELDS
    values = {"PROMPT": call.prompt, **{name: checked[name.lower()] for name in names}}
    image_sha256 = None if call.image is None else hashlib.sha256(call.image).hexdigest()
    # A draw of the seed is the server's: a submission repeated with 0 asks for the same as before.
    asked = {**values, "SEED": call.values.get("SEED", 0)}
    return JobRequest(
        job_id=job_id,
        token=secrets.token_hex(8),
        sequence=0,
        model=ensemble,
        values=values,
        image_sha256=image_sha256,
        fps=delivery.fps,
        preview=delivery.preview,
        priority_level=scheduling.priority_level,
        identity=identify(ensemble, asked, image_sha256, delivery.fps),
        submitted_at=0.0,
    )
