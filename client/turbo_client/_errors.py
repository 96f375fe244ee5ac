"""The client's error tree, and the one table that maps gRPC statuses onto it.

    TurboDiffusionError
    ├── APIError                     the server answered with a status (`.code`)
    │   ├── InvalidArgumentError     INVALID_ARGUMENT, OUT_OF_RANGE
    │   ├── NotFoundError            NOT_FOUND, or UNKNOWN saying "unknown model"
    │   ├── AlreadyExistsError       ALREADY_EXISTS
    │   ├── UnauthenticatedError     UNAUTHENTICATED
    │   ├── PermissionDeniedError    PERMISSION_DENIED
    │   ├── ResourceExhaustedError   RESOURCE_EXHAUSTED, or UNAVAILABLE marked "[RESOURCE_EXHAUSTED]"
    │   ├── CancelledError           CANCELLED
    │   ├── UnavailableError         UNAVAILABLE, from a server that can be reached
    │   ├── UnimplementedError       UNIMPLEMENTED
    │   └── InternalError            INTERNAL, UNKNOWN, DATA_LOSS, ABORTED, FAILED_PRECONDITION
    ├── UnreachableError             no connection, or it broke       (also a ConnectionError)
    ├── DeadlineExceededError        the call's timeout passed, or the request's deadline (also a TimeoutError)
    ├── MalformedResponseError       the answer is not what this client speaks
    ├── ManifestError                no readable replay manifest      (also a ValueError)
    └── MissingExtraError            an optional package is needed    (also an ImportError)

A value that cannot be put on the wire at all raises Python's own TypeError or ValueError before anything is sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import grpc


class TurboDiffusionError(Exception):
    """Anything that this client knows how to explain.

    Args:
        message: one readable line.
        request_id: id of the request at fault, as the server's logs and REPORT name it.
    """

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments do not survive the default pickling of exceptions.
        return _rebuild, (type(self), self.message, self.__dict__)


def _rebuild(kind: type[TurboDiffusionError], message: str, state: dict[str, object]) -> TurboDiffusionError:
    error = kind(message)
    error.__dict__.update(state)
    return error


class APIError(TurboDiffusionError):
    """The server answered with a status other than OK.

    Attributes:
        code: the gRPC status, None where the server sent a message without one.
    """

    def __init__(self, message: str, *, request_id: str | None = None, code: grpc.StatusCode | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.code = code


class InvalidArgumentError(APIError):
    """A value outside its range; the message names the field, the value and what fits."""


class NotFoundError(APIError):
    """The server has no such model or job."""


class AlreadyExistsError(APIError):
    """The id is taken: a job of that id asks for something else."""


class UnauthenticatedError(APIError):
    """The API key is missing or wrong."""


class PermissionDeniedError(APIError):
    """This caller may not do that."""


class ResourceExhaustedError(APIError):
    """The request does not fit into memory or quota. Never retried: the same request would fail again."""


class CancelledError(APIError):
    """The request was given up, by this side or by the server."""


class UnavailableError(APIError):
    """The server is there but cannot serve this now (loading, shutting down, misconfigured)."""


class UnimplementedError(APIError):
    """The server does not offer this call."""


class InternalError(APIError):
    """The server failed."""


class UnreachableError(TurboDiffusionError, ConnectionError):
    """No connection to the server, or the connection broke."""


class DeadlineExceededError(TurboDiffusionError, TimeoutError):
    """The call did not end in the time given to it."""


class MalformedResponseError(TurboDiffusionError):
    """The server's answer is not what this client speaks."""


class ManifestError(TurboDiffusionError, ValueError):
    """The file holds no readable replay manifest."""


class MissingExtraError(TurboDiffusionError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""


#: The status table. A status that is absent here is an InternalError; DEADLINE_EXCEEDED has its own class.
STATUS_ERRORS: dict[grpc.StatusCode, type[APIError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}

#: What Triton puts before the message of a model that an ensemble called.
_IN_ENSEMBLE = re.compile(r"^in ensemble '[^']*', ")

#: Triton's own status says too little for these, so their messages decide, whatever the status.
MESSAGE_ERRORS: tuple[tuple[re.Pattern[str], type[APIError]], ...] = (
    (re.compile(r"\[RESOURCE_EXHAUSTED\]"), ResourceExhaustedError),
    (re.compile(r"Request for unknown model: .* is not found", re.DOTALL), NotFoundError),
    # Known, but unloaded: the server is stopping.
    (re.compile(r"Request for unknown model: .* has no available versions", re.DOTALL), UnavailableError),
    (
        re.compile(r"(\[request id: [^]]*\] )?(expected number of inputs|unexpected inference input)"),
        InvalidArgumentError,
    ),
    (re.compile(r"This protocol is restricted"), PermissionDeniedError),
)


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """How an RPC ended, freed from grpc's sync and asyncio exception classes."""

    code: grpc.StatusCode
    details: str

    @classmethod
    def of(cls, error: Any) -> RpcStatus:
        """Reads a `grpc.RpcError`, which carries its status in methods that its class does not declare."""
        return cls(error.code(), error.details() or "")


def error_from_status(status: RpcStatus, *, request_id: str | None = None) -> TurboDiffusionError:
    """The typed error of a status. UNAVAILABLE becomes UnavailableError; only the caller can tell it from a
    broken connection, because gRPC reports both alike."""
    message = _IN_ENSEMBLE.sub("", status.details) or f"the server answered {status.code.name} without a message"
    if status.code is grpc.StatusCode.DEADLINE_EXCEEDED or message.startswith("[DEADLINE_EXCEEDED]"):
        return DeadlineExceededError(message, request_id=request_id)
    for pattern, kind in MESSAGE_ERRORS:
        if pattern.match(message):
            return kind(message, request_id=request_id, code=status.code)
    kind = STATUS_ERRORS.get(status.code, InternalError)
    return kind(message, request_id=request_id, code=status.code)
