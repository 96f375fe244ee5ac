"""What a failed attempt means for its job: over, or to be tried again."""

from __future__ import annotations

import re
from enum import Enum

#: Answers about the request itself: the same request would get them again.
_REFUSALS = ("INVALID_ARG", "NOT_FOUND", "UNSUPPORTED", "ALREADY_EXISTS")
#: A full queue empties.
_QUEUE_FULL = re.compile(r"\[RESOURCE_EXHAUSTED\] \d+ requests wait or run already")
#: Where a stage itself failed, or memory was short, the same may well happen again. Whatever else Triton says, while
#: its processes die or it stops, is no answer about the request; it has many words for that.
_OWN = re.compile(r"\[RESOURCE_EXHAUSTED\]|\(request \S+\)$")
MAX_OWN_FAILURES = 3
MAX_FAILURES = 30


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
    if _QUEUE_FULL.search(failure.message):
        return Verdict.RETRY
    limit = MAX_OWN_FAILURES if _OWN.search(failure.message) else MAX_FAILURES
    return Verdict.RETRY if failures + 1 < limit else Verdict.FAIL
