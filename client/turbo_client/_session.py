"""What the sync and the asyncio client have in common: their settings, and their methods' parameters."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from turbo_client._connection import ChannelOption, Connection
from turbo_client._errors import DeadlineExceededError, UnavailableError, UnreachableError
from turbo_client._generation import Generation
from turbo_client._jobs import Wait, choose_job_id, encode_submission
from turbo_client._protocol import ModelReadyRequest, ServerReadyRequest
from turbo_client._requests import GenerationRequest
from turbo_client._settings import TLS, RetryPolicy, Timeout

#: What gRPC says before it says why.
_GRPC_PREFACE = re.compile(r"failed to connect to all addresses; last error: [A-Z_]+: (ip\S+: )?")
#: What gRPC says of ports that speak something else, and what that means.
_WRONG_PORTS = (
    ("WRONG_VERSION_NUMBER", "that port does not speak TLS"),
    ("Socket closed", "that port does not speak gRPC (8001 does by default), or expects TLS"),
    ("Failed parsing HTTP/2", "that port does not speak gRPC (8001 does by default)"),
)

_P = ParamSpec("_P")
_Self = TypeVar("_Self")
_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


def takes(
    make: Callable[_P, _Request],
) -> Callable[[Callable[[_Self, _Request], _Result]], Callable[Concatenate[_Self, _P], _Result]]:
    """Gives a method that takes a request object the parameters of that object's constructor.

    So the parameters of `generate` and `stream`, sync and asyncio, are written down in one place.
    """

    def decorate(method: Callable[[_Self, _Request], _Result]) -> Callable[Concatenate[_Self, _P], _Result]:
        @functools.wraps(method)
        def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
            return method(self, make(*args, **kwargs))

        own, made = inspect.signature(method), inspect.signature(make)
        this = next(iter(own.parameters.values()))
        call.__signature__ = made.replace(  # type: ignore[attr-defined]
            parameters=[this, *made.parameters.values()], return_annotation=own.return_annotation
        )
        return call

    return decorate


class Session:
    """Settings of a client of one server.

    Args:
        url: HOST:PORT of the server's gRPC port.
        model: ensemble that requests go to unless they name another; None for "text_to_video", or "image_to_video" for
            those with an image.
        timeout: a `Timeout`, or seconds for a whole generation; None for no limit on generations.
        tls: TLS settings; None for plaintext.
        api_key: sent with every call.
        api_key_header: header that carries it; under "authorization" it is a Bearer token.
        retries: when to send a request again.
        max_message_bytes: limit of one message; None for gRPC's own limit of 2 GB.
        channel_options: further gRPC channel arguments, which win over the client's own.

    Raises:
        ValueError: a setting that cannot work.
        OSError: a PEM file cannot be read.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        model: str | None = None,
        timeout: Timeout | float | None = Timeout(),  # noqa: B008 - frozen
        tls: TLS | None = None,
        api_key: str | None = None,
        api_key_header: str = "authorization",
        retries: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        max_message_bytes: int | None = None,
        channel_options: Sequence[ChannelOption] = (),
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = Timeout.of(timeout)
        self.retries = retries
        self._connection = Connection.to(
            url,
            tls=tls,
            timeout=self.timeout,
            api_key=api_key,
            api_key_header=api_key_header,
            max_message_bytes=max_message_bytes,
            channel_options=channel_options,
        )
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, model={self.model!r})"

    def _generation(self, request: GenerationRequest) -> Generation:
        model = self.model or request.ensemble
        return Generation(request, model=model, timeout=self.timeout.total, retries=self.retries)

    def _wait(self, job_id: str, operation: str, timeout: float | None) -> Wait:
        limit = self.timeout.total if timeout is None else timeout
        return Wait(job_id, operation, timeout=None if limit == math.inf else limit, retries=self.retries)

    def _submission(self, request: GenerationRequest) -> tuple[str, Any]:
        """A job's id and the message that submits it."""
        job_id = choose_job_id(request)
        model = request.model or self.model or request.ensemble
        return job_id, encode_submission(request, job_id=job_id, model=model)

    def _readiness(self) -> tuple[str, Any, str]:
        """The call that tells whether the client's model serves, its message, and what to say when it does not."""
        if self.model is None:
            return "ServerReady", ServerReadyRequest(), "the server is not ready"
        return "ModelReady", ModelReadyRequest(name=self.model), f"model {self.model} is not ready"

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")

    def _unreachable(self, error: UnavailableError) -> UnreachableError:
        reason, never_connected = _GRPC_PREFACE.subn("", error.message)
        if not never_connected:
            return UnreachableError(f"the connection to {self.url} broke: {reason}", request_id=error.request_id)
        reason = next((meaning for said, meaning in _WRONG_PORTS if said in reason), reason)
        return UnreachableError(f"cannot reach {self.url}: {reason}", request_id=error.request_id)

    def _never_ready(self, timeout: float, reason: str) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self.url} was not ready within {timeout:g} s: {reason}")
