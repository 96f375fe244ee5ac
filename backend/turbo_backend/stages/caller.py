"""The answers to one request of the denoiser: steps, words that keep it open, and the one that is the last."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from turbo_backend.errors import TurboError, error_to_report
from turbo_backend.stages.denoiser_request import DenoisedStep
from turbo_backend.stages.held_open import HeldOpen


class Caller:
    """Gives one request its answers, from any thread; after the last one there is no word more.

    An error ends the request as one only before its first step. Triton 2.51 never releases an ensemble that fails while
    another of its models runs, and tells no error's status to the jobs: later, and of a job, it is a report, by which
    the next model, which may be at work on the last step, ends the request.

    Args:
        send: sends an answer; called with whether it is the last one.
        fail: ends the request with an error.
        held_open: keeps the request open after its latents, while they are decoded.
        is_job: a job, whose caller does not wait for it: it is not held open.
    """

    def __init__(
        self,
        send: Callable[[DenoisedStep, bool], None],
        fail: Callable[[TurboError], None],
        *,
        held_open: HeldOpen,
        is_job: bool,
    ) -> None:
        self._send, self._fail = send, fail
        self._held_open, self._is_job = held_open, is_job
        self._lock = threading.Lock()
        self._is_held = self._is_over = False
        self._next_fails = is_job

    def hold(self, token: str) -> None:
        """Keeps a request open whose caller may leave, until its video is made; `token` is that of its steps."""
        with self._lock:
            if not self._is_job and not self._is_over and self._held_open.hold(token, partial(self._say, token)):
                self._is_held = self._next_fails = True

    def __call__(self, update: DenoisedStep | TurboError) -> None:
        """A step that is done, or what ended the request."""
        with self._lock:
            if not isinstance(update, TurboError):
                self._next_fails = True
                self._is_over = update.report is not None and not self._is_held
                self._send(update, self._is_over)
                return
            self._is_over = True
            if self._next_fails:
                self._send_report(error_to_report(update))
            else:
                self._fail(update)

    def _say(self, token: str, is_last: bool) -> bool:
        """A word for `HeldOpen`."""
        with self._lock:
            if self._is_over:
                return False
            self._is_over = is_last
            self._send_report({"is_last_word": is_last}, token)
            return not self._is_over

    def _send_report(self, report: dict[str, object], token: str = "") -> None:
        self._send(DenoisedStep(step=0, step_count=0, cancel_token=token, report=report), self._is_over)
