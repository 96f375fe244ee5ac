"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc

from turbo_client._client_jobs import Jobs
from turbo_client._errors import (
    RpcStatus,
    TurboDiffusionError,
    UnavailableError,
    UnreachableError,
    error_from_status,
)
from turbo_client._generation import Generation, Progress
from turbo_client._jobs import encode_call
from turbo_client._protocol import (
    RepositoryIndexRequest,
    ServerLiveRequest,
    ServerMetadataRequest,
    ServerReadyRequest,
    Stub,
)
from turbo_client._requests import GenerationRequest
from turbo_client._session import Session, takes
from turbo_client._status import ServerStatus
from turbo_client._video import Video

_POLL_SECONDS = 0.25


class Client(Session):
    __doc__ = Session.__doc__
    _opened: Any = None
    _channel: Any = None

    @takes(GenerationRequest)
    def generate(self, request: GenerationRequest) -> Video:
        """Generates a video and waits for it. Parameters are those of `GenerationRequest`.

        Raises:
            TurboDiffusionError: see the tree in `turbo_client._errors`.
        """
        with VideoStream(self, self._generation(request)) as stream:
            return stream.result()

    @takes(GenerationRequest)
    def stream(self, request: GenerationRequest) -> VideoStream:
        """Generates a video and tells how far it is. Parameters are those of `GenerationRequest`."""
        return VideoStream(self, self._generation(request))

    @property
    def jobs(self) -> Jobs:
        """Requests that the server keeps and runs by itself."""
        return Jobs(self)

    def cancel(self, request_id: str) -> None:
        """Ends a running `generate` or `stream` of any client, by its request id; its caller gets a CancelledError.

        One that no request has is kept for an hour, for a request that is still on its way: so a request that is sent
        again after its cancellation takes another id. Jobs are cancelled by `jobs.cancel`.
        """
        self._call("ModelInfer", encode_call("cancel_request", job_id=request_id))

    def status(self) -> ServerStatus:
        """Asks the server for its health and its models."""
        return ServerStatus.of(
            self._call("ServerLive", ServerLiveRequest()),
            self._call("ServerReady", ServerReadyRequest()),
            self._call("ServerMetadata", ServerMetadataRequest()),
            self._call("RepositoryIndex", RepositoryIndexRequest()),
        )

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until the client's model serves; without one of its own, until all models of the server do.

        Raises:
            DeadlineExceededError: it did not within `timeout` seconds; the message says what was seen last.
        """
        deadline = time.monotonic() + timeout
        method, question, not_ready = self._readiness()
        while True:
            try:
                if self._call(method, question).ready:
                    return
                reason = not_ready
            except (UnreachableError, UnavailableError, TimeoutError) as error:
                reason = str(error)
            if time.monotonic() + _POLL_SECONDS > deadline:
                raise self._never_ready(timeout, reason)
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Closes the connection; requests still running are cancelled."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _stub(self) -> Any:
        self._refuse_if_closed()
        if self._opened is None:
            self._channel = self._connection.open(grpc)
            self._opened = Stub(self._channel)
        return self._opened

    def _call(self, method: str, request: Any, *, timeout: float | None = None) -> Any:
        limit = self.timeout.status if timeout is None else timeout
        try:
            return getattr(self._stub, method)(request, timeout=limit, metadata=self._connection.metadata)
        except grpc.RpcError as failure:
            error = error_from_status(RpcStatus.of(failure))
        raise self._located(error)

    def _located(self, error: TurboDiffusionError) -> TurboDiffusionError:
        """Tells a server that answers UNAVAILABLE from one that cannot be reached, which gRPC reports alike: asks
        whether it is live."""
        if isinstance(error, UnavailableError):
            try:
                self._stub.ServerLive(
                    ServerLiveRequest(), timeout=self.timeout.status, metadata=self._connection.metadata
                )
            except grpc.RpcError as failure:
                if RpcStatus.of(failure).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return self._unreachable(error)
        return error


class VideoStream:
    """A running generation: a context manager, and an iterator of `Progress`.

        with client.stream("a red fox") as stream:
            for progress in stream:
                print(progress.stage, progress.step)
            video = stream.result()

    The request is sent on entering, or by the first progress asked for. Leaving the block early cancels it.
    """

    def __init__(self, client: Client, generation: Generation) -> None:
        self._client = client
        self._generation = generation
        self._call: Any = None
        self._error: TurboDiffusionError | None = None
        self._ended = False
        self._cancelled = threading.Event()

    @property
    def request_id(self) -> str:
        """The request's id, as logs and errors name it."""
        return self._generation.request_id

    def __enter__(self) -> VideoStream:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self.cancel()

    def __iter__(self) -> Iterator[Progress]:
        return self

    def __next__(self) -> Progress:
        while True:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopIteration
            try:
                progress = self._receive()
            except TurboDiffusionError as error:
                self._error, self._ended = error, True
                if self._call is not None:
                    self._call.cancel()
                raise
            if progress is not None:
                return progress

    def result(self) -> Video:
        """Waits for the end and returns the video.

        Raises:
            TurboDiffusionError: the generation failed or was cancelled.
        """
        for _ in self:
            pass
        return self._generation.result()

    def cancel(self) -> None:
        """Gives the request up; another thread may call this too. Whoever waits on it gets a CancelledError."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    def _start(self) -> None:
        if self._call is None and not self._ended:
            self._call = self._client._stub.ModelStreamInfer(
                iter((self._generation.message,)),
                timeout=self._generation.begin_attempt(),
                metadata=self._client._connection.metadata,
            )
            if self._cancelled.is_set():  # between two attempts
                self._call.cancel()

    def _receive(self) -> Progress | None:
        self._start()
        try:
            return self._generation.receive(next(self._call))
        except StopIteration:
            self._ended = True
            return None
        except grpc.RpcError as failure:
            outcome = self._generation.fail(RpcStatus.of(failure))
        if outcome is None:
            self._ended = True
        elif self._cancelled.is_set():
            raise self._generation.cancelled()
        elif isinstance(outcome, float):
            self._call = None
            if self._cancelled.wait(outcome):
                raise self._generation.cancelled()
        else:
            raise self._client._located(outcome)
        return None
