"""The course of one generation, without I/O: both transports feed it what arrives and do what it says."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from turbo_client._errors import (
    CancelledError,
    DeadlineExceededError,
    MalformedResponseError,
    RpcStatus,
    TurboDiffusionError,
    UnavailableError,
    error_from_status,
)
from turbo_client._requests import GenerationRequest
from turbo_client._responses import decode_response
from turbo_client._settings import RetryPolicy
from turbo_client._video import Video


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One step of the work is done.

    Attributes:
        stage: "text_encoder", "denoiser", "vae_decoder", or "done" for the last.
        step, num_steps: how far this stage is: denoising steps, or latent chunks in the decoder.
        seconds: since the request was sent, queueing included.
        eta_seconds: estimated seconds to the end of this stage; None before there is anything to estimate from.
        preview: JPEG of the step's estimate of the clean video, None where there is none.
    """

    stage: str
    step: int
    num_steps: int
    seconds: float
    eta_seconds: float | None
    preview: bytes | None = field(repr=False)


class Generation:
    """State of one request over all its attempts.

    Args:
        request: what to generate.
        model: ensemble to call when the request names none.
        timeout: seconds for everything when the request gives none; None for no limit.
        retries: when to send again.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        model: str,
        timeout: float | None,
        retries: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request_id = request.request_id or secrets.token_hex(8)
        self.message = request.encode_stream(model=request.model or model, request_id=self.request_id)
        self.video: Video | None = None
        self.num_attempts = 0
        limit = request.timeout if request.timeout is not None else timeout
        self._limit = math.inf if limit is None else limit
        self._retries = retries
        self._clock = clock
        self._started: float | None = None
        self._answered = False
        self._pace = Pace()

    def begin_attempt(self) -> float | None:
        """Counts an attempt and returns its deadline in seconds from now, None for no limit."""
        now = self._clock()
        if self._started is None:
            self._started = now
            self._pace.begin(now)
        self.num_attempts += 1
        # gRPC answers a deadline of zero with DEADLINE_EXCEEDED by itself.
        return None if math.isinf(self._limit) else max(0.0, self._started + self._limit - now)

    def receive(self, message: Any) -> Progress | None:
        """Takes one `ModelStreamInferResponse`; None when it carries no progress.

        Raises:
            TurboDiffusionError: an error message in place of a response, or a malformed one.
        """
        self._answered = True
        if message.error_message:
            # A server that does not know the header for true status codes says it in words alone.
            raise error_from_status(
                RpcStatus(grpc.StatusCode.UNKNOWN, message.error_message), request_id=self.request_id
            )
        response = decode_response(message.infer_response, request_id=self.request_id)
        if response is None:
            return None
        now = self._clock()
        if response.report is not None:
            self.video = Video.of(response, request_id=self.request_id)
        assert self._started is not None
        return Progress(
            stage=response.stage,
            step=response.step,
            num_steps=response.num_steps,
            seconds=now - self._started,
            eta_seconds=self._pace.estimate(response.stage, response.step, response.num_steps, now),
            preview=response.preview or None,
        )

    def fail(self, status: RpcStatus) -> float | TurboDiffusionError | None:
        """Decides on a failed RPC: seconds to wait before the next attempt, the error to raise, or None when the
        video had arrived already and the failure no longer matters."""
        if self.video is not None:
            return None
        error = error_from_status(status, request_id=self.request_id)
        if status.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._out_of_time()
        if (
            isinstance(error, UnavailableError)
            and not self._answered
            and self.num_attempts < self._retries.max_attempts
        ):
            delay = self._retries.delay(self.num_attempts)
            assert self._started is not None
            if self._clock() + delay < self._started + self._limit:
                return delay
        return error

    def result(self) -> Video:
        """The video, once the stream has ended.

        Raises:
            MalformedResponseError: it ended without one.
        """
        if self.video is None:
            raise MalformedResponseError("the server ended the stream without a video", request_id=self.request_id)
        return self.video

    def cancelled(self) -> CancelledError:
        """The error for a request that this side gave up."""
        return CancelledError(
            "the request was cancelled by the caller", request_id=self.request_id, code=grpc.StatusCode.CANCELLED
        )

    def _out_of_time(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"no video within {self._limit:g} s", request_id=self.request_id)


class Pace:
    """Estimates a stage's remaining time from the mean time of its steps so far."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._last = 0.0
        self._first_step = 0
        self._first_time = 0.0

    def begin(self, now: float) -> None:
        self._last = now

    def estimate(self, stage: str, step: int, num_steps: int, now: float) -> float | None:
        if stage != self._stage:
            # The first step is timed from the response before it: too long where the request queued, and forgotten
            # as soon as a second step tells better.
            seconds_a_step = (now - self._last) / step if step > 0 else None
            self._stage, self._first_step, self._first_time = stage, step, now
        elif step > self._first_step:
            seconds_a_step = (now - self._first_time) / (step - self._first_step)
        else:
            seconds_a_step = None
        self._last = now
        remaining = num_steps - step
        if remaining < 0 or seconds_a_step is None:
            return None
        return seconds_a_step * remaining
