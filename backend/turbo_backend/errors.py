"""The error tree of the server room.

    TurboError                      INTERNAL
    ├── InvalidArgument             INVALID_ARG     names field, value and what fits
    ├── CheckpointError             INTERNAL        a weight file that does not fit its network
    ├── ResourceExhausted           UNAVAILABLE     out of memory, before or during a run; too many requests
    ├── DeadlineExceeded            UNAVAILABLE     what cannot be done, or was not done, in the time given
    ├── Cancelled                   CANCELLED
    ├── NotFound                    NOT_FOUND       no job of that id
    ├── AlreadyExists               ALREADY_EXISTS  a job of that id asks for something else
    ├── Unsupported                 UNSUPPORTED     this server does not offer that
    ├── Unavailable                 UNAVAILABLE     not now; the message says when
    └── Misconfigured               UNAVAILABLE     an environment variable or installation at fault

`code` is the Triton status that the adapters answer with; Triton 2.51 has neither RESOURCE_EXHAUSTED nor
DEADLINE_EXCEEDED, so those classes answer UNAVAILABLE and begin their message with `[RESOURCE_EXHAUSTED]` or
`[DEADLINE_EXCEEDED]`, which the SDK reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class TurboError(Exception):
    """Anything this server knows how to explain."""

    code: ClassVar[str] = "INTERNAL"


class InvalidArgument(TurboError, ValueError):
    """A request value outside its range.

    Args:
        field: wire name of the tensor or request parameter, such as `NUM_STEPS`.
        value: what was received.
        fits: what would have been accepted, in words.
    """

    code: ClassVar[str] = "INVALID_ARG"

    def __init__(self, field: str, value: object, fits: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = f"{shown[:60]}... ({len(shown)} characters)"
        super().__init__(f"{field} = {shown}: must be {fits}")
        self.field = field
        self.value = value
        self.fits = fits


class CheckpointError(TurboError):
    """A weight file is absent, unreadable, or does not hold what the network needs."""


class ResourceExhausted(TurboError):
    """The request does not fit into memory, or into the queue."""

    code: ClassVar[str] = "UNAVAILABLE"

    def __init__(self, message: str) -> None:
        super().__init__(f"[RESOURCE_EXHAUSTED] {message}")


class DeadlineExceeded(TurboError):
    """The request cannot be done in the time that it gave, or was not."""

    code: ClassVar[str] = "UNAVAILABLE"

    def __init__(self, message: str) -> None:
        super().__init__(f"[DEADLINE_EXCEEDED] {message}")


class Cancelled(TurboError):
    """The caller gave the request up."""

    code: ClassVar[str] = "CANCELLED"


class NotFound(TurboError):
    """There is no such job."""

    code: ClassVar[str] = "NOT_FOUND"


class AlreadyExists(TurboError):
    """The id is taken."""

    code: ClassVar[str] = "ALREADY_EXISTS"


class Unsupported(TurboError):
    """This server does not offer that."""

    code: ClassVar[str] = "UNSUPPORTED"


class Unavailable(TurboError):
    """That cannot be done now, and can be later."""

    code: ClassVar[str] = "UNAVAILABLE"


class Misconfigured(TurboError):
    """The server's own settings or installation cannot work."""

    code: ClassVar[str] = "UNAVAILABLE"


def error_to_report(error: TurboError, message: str | None = None) -> dict[str, object]:
    """An error as a stage passes it on in place of its report, in other words where it is told some."""
    return {"error": {"code": error.code, "message": message or str(error)}}


def raise_reported(report: Mapping[str, object]) -> None:
    """Raises the error that the stage before passed on, if it did."""
    told = report.get("error")
    if isinstance(told, Mapping):
        kinds = {kind.code: kind for kind in (TurboError, Cancelled, Unavailable)}
        raise kinds.get(str(told.get("code")), TurboError)(str(told.get("message")))
