"""The sampler's state after each finished step of a job, by which it goes on after an interruption.

`steps/REQUEST_ID/STEP` holds the magic `TDSTEP1\\n`, the SHA-256 of all that follows, the length of a header as uint32
(little endian), the header as JSON, and the state's float64 values. The last two steps are kept: a file that cannot be
read, or that belongs to other weights or versions, costs one step, or the steps that it stood for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Mapping

import numpy as np
import torch

from turbo_backend.errors import TurboError
from turbo_backend.jobs.names import finished_steps, job_of_request, request_name, step_name
from turbo_backend.jobs.records import JobRequest, unseal
from turbo_backend.jobs.storage import Storage, open_storage
from turbo_backend.settings import Settings

_log = logging.getLogger(__name__)

_MAGIC = b"TDSTEP1\n"
_LENGTH = struct.Struct("<I")
_KEPT = 2


class StepFiles:
    """Finished steps in a storage; the denoiser's `StepStore`.

    Args:
        storage: where the jobs are.
        identity: all that decides a step's bits besides the request: weights, precision, providers, versions.
    """

    def __init__(self, storage: Storage, identity: Mapping[str, object]) -> None:
        self._storage = storage
        self._identity = json.loads(json.dumps(dict(identity)))
        self._known: str | None = None

    def save(self, request_id: str, step: int, state: torch.Tensor) -> None:
        """Keeps the float64 state on the CPU after `step` finished steps.

        Raises:
            TurboError: the store is full or does not work, or no job runs under that id.
        """
        self._check_job(request_id)
        self._storage.write(step_name(request_id, step), _pack(self._identity, step, state))
        for old in finished_steps(self._storage, request_id)[:-_KEPT]:
            self._storage.delete(step_name(request_id, old))

    def load(self, request_id: str) -> tuple[int, torch.Tensor] | None:
        """(finished steps, state) of the newest usable step, None where there is none; errors as in `save`."""
        self._check_job(request_id)
        for step in reversed(finished_steps(self._storage, request_id)):
            content = self._storage.read(step_name(request_id, step))
            if content is None:
                continue
            try:
                identity, state = _unpack(content, step)
            except ValueError as error:
                _log.warning("step %d of %s cannot be used: %s", step, request_id, error)
                continue
            if identity == self._identity:
                return step, state
            _log.warning("step %d of %s was made with other weights, settings or versions", step, request_id)
        return None

    def _check_job(self, request_id: str) -> None:
        """Keeps requests that only call themselves durable out of the store."""
        if request_id == self._known:
            return
        job_id = job_of_request(request_id)
        content = self._storage.read(request_name(job_id)) if job_id else None
        if content is None or unseal(JobRequest, content).request_id != request_id:
            raise TurboError(f"no job runs under request id {request_id!r}: its steps are not kept")
        self._known = request_id


def open_step_files(settings: Settings, identity: Mapping[str, object]) -> StepFiles | None:
    """Where the denoiser keeps the steps of jobs; None for a server without jobs."""
    location = settings.job_store_location
    return None if location is None else StepFiles(open_storage(location), identity)


def _pack(identity: Mapping[str, object], step: int, state: torch.Tensor) -> bytes:
    header = json.dumps({"step": step, "shape": list(state.shape), "identity": identity}).encode("utf-8")
    values = np.ascontiguousarray(state.numpy(), dtype="<f8").tobytes()
    body = b"".join((_LENGTH.pack(len(header)), header, values))
    return _MAGIC + hashlib.sha256(body).digest() + body


def _unpack(content: bytes, step: int) -> tuple[object, torch.Tensor]:
    digest, body = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if not content.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum does not fit")
    (length,) = _LENGTH.unpack_from(body)
    header = json.loads(body[_LENGTH.size :][:length])
    if header["step"] != step:
        raise ValueError(f"it holds step {header['step']}")
    values = np.frombuffer(body, "<f8", offset=_LENGTH.size + length).reshape(header["shape"])
    return header["identity"], torch.from_numpy(values.astype(np.float64))
