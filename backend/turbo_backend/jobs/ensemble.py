"""Runs one job through its ensemble, inside Triton (BLS): no address, no port, no second way in.

Triton 2.51 lets a Python model's own threads send such requests at any time, also while none of its own is at work, and
gives them the responses of a decoupled ensemble one by one. A model process that dies leaves them waiting; then the
server itself has to be started anew, which is the launcher's to do, and the job goes on after that. So it is where the
threads of this process block one another for ever (`standstill`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from turbo_backend import triton_adapter as triton
from turbo_backend.jobs.outcome import AttemptFailed
from turbo_backend.jobs.records import JobRequest
from turbo_backend.jobs.runner import Update

#: How an InvalidArgument of the first stages reads, whose status Triton loses on the way.
_REFUSAL = re.compile(r"[A-Z_]+ = .*: must be ", re.DOTALL)
_OUTPUTS = ("STAGE", "STEP", "STEP_COUNT", "PREVIEW", "VIDEO", "REPORT")


def generate(request: JobRequest, image: bytes | None) -> Iterator[Update]:
    """The updates of one run.

    Raises:
        AttemptFailed: the ensemble answered with an error.
    """
    inputs = [triton.write_scalar(name, value) for name, value in request.values.items()]
    if image is not None:
        inputs.append(triton.write_bytes("IMAGE", image))
    parameters = {
        "container": "mp4",
        "fps": request.fps,
        "preview": request.preview,
        "priority_level": request.priority_level,
        "durable": True,
    }
    failure = None
    for answer in triton.call_model(request.model, inputs, _OUTPUTS, request.request_id, parameters):
        if isinstance(answer, str):
            failure = AttemptFailed("INVALID_ARG" if _REFUSAL.search(answer) else "INTERNAL", answer)
            continue  # a stub whose answers are not taken to the end hangs
        stage = answer["STAGE"].decode("utf-8")
        if stage == "error":
            error = json.loads(answer["REPORT"])["error"]
            failure = AttemptFailed(error["code"], error["message"])
            continue
        yield Update(
            stage=stage,
            step=answer["STEP"],
            step_count=answer["STEP_COUNT"],
            preview=answer["PREVIEW"],
            video=answer["VIDEO"],
            report=answer["REPORT"].decode("utf-8"),
        )
    if failure is not None:
        raise failure
