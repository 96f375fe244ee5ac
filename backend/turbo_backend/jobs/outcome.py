"""What a failed attempt means for its job: over, or to be tried again."""

from __future__ import annotations

import re
from enum import Enum

#: Answers about the request itself: the same request would get them again.
_REFUSALS = ("INVALID_ARG", "NOT_FOUND", "UNSUPPORTED", "ALREADY_EXISTS")
#: Triton's words for a model process that died, or a server that is stopping: no answer about the request at all.
_SERVER_TROUBLE = re.compile(
    r"Stub process .* is not healthy|has stopped accepting new inference requests|is not ready"
)
#: A full queue empties; attempts against memory that is short, or a stage that fails, are counted.
_QUEUE_FULL = re.compile(r"\[RESOURCE_EXHAUSTED\] \d+ requests wait or run already")
MAX_FAILURES = 3


class AttemptFailed(Exception):
    """The ensemble ended a job's request with an error.

    Args:
        code: Triton's status.
        message: its words.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Verdict(Enum):
    """What follows."""

    FAIL = "fail"
    CANCEL = "cancel"
    RETRY = "retry"


def judge(failure: AttemptFailed, *, failures: int) -> Verdict:
    """What follows a failed attempt of a job that failed `failures` times in a row before."""
    if failure.code == "CANCELLED":
        return Verdict.CANCEL
    if failure.code in _REFUSALS:
        return Verdict.FAIL
    if _SERVER_TROUBLE.search(failure.message) or _QUEUE_FULL.search(failure.message):
        return Verdict.RETRY
    return Verdict.RETRY if failures + 1 < MAX_FAILURES else Verdict.FAIL
