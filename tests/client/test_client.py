"""Both clients against a real gRPC server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from fake_triton import FRAMES, PREVIEW, REPORT, FakeTriton, empty_final, read_inputs, respond, start_server

from turbo_client import (
    TLS,
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    MalformedResponseError,
    ResourceExhaustedError,
    RetryPolicy,
    ServerStatus,
    Timeout,
    TurboDiffusionError,
    UnauthenticatedError,
    UnavailableError,
    UnreachableError,
    Video,
)
from turbo_client._errors import STATUS_ERRORS

QUICK = RetryPolicy(initial_delay=0.01, max_delay=0.02)


class Driver:
    """One way to use either client, so that each test below runs on both."""

    def __init__(self, kind: str) -> None:
        self.blocking = kind == "blocking"

    def __repr__(self) -> str:
        return "blocking" if self.blocking else "asyncio"

    def call(self, address: str, method: str, *args: Any, client: dict[str, Any] | None = None, **values: Any) -> Any:
        settings = {"retries": QUICK} | (client or {})
        if self.blocking:
            with Client(address, **settings) as blocking:
                return getattr(blocking, method)(*args, **values)

        async def run() -> Any:
            async with AsyncClient(address, **settings) as asynchronous:
                return await getattr(asynchronous, method)(*args, **values)

        return asyncio.run(run())

    def generate(self, address: str, prompt: str = "a fox", **values: Any) -> Video:
        video = self.call(address, "generate", prompt, **values)
        assert isinstance(video, Video)
        return video

    def stream(self, address: str, act: Callable[[Any, Any], None] = lambda stream, progress: None, **values: Any):
        """All progress of a stream and its video; `act` runs at each progress."""
        if self.blocking:
            with Client(address, retries=QUICK) as blocking, blocking.stream("a fox", **values) as stream:
                seen = []
                for progress in stream:
                    seen.append(progress)
                    act(stream, progress)
                return seen, stream.result()

        async def run() -> Any:
            async with (
                AsyncClient(address, retries=QUICK) as asynchronous,
                asynchronous.stream("a fox", **values) as stream,
            ):
                seen = []
                async for progress in stream:
                    seen.append(progress)
                    act(stream, progress)
                return seen, await stream.result()

        return asyncio.run(run())


@pytest.fixture(params=["blocking", "asyncio"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


def aborting(code: grpc.StatusCode, message: str, *, after: int = 0) -> Callable[..., Iterator[Any]]:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for step in range(after):
            yield respond(request, "denoiser", step + 1, 4)
        context.abort(code, message)

    return answer


def test_progress_comes_in_order(driver: Driver, fake: FakeTriton) -> None:
    seen, video = driver.stream(fake.address, num_steps=3, preview=True)
    assert [(item.stage, item.step, item.num_steps) for item in seen] == [
        ("denoiser", 1, 3),
        ("denoiser", 2, 3),
        ("denoiser", 3, 3),
        ("vae_decoder", 1, 2),
        ("vae_decoder", 2, 2),
        ("done", 1, 1),
    ]
    assert [item.preview for item in seen] == [PREVIEW] * 3 + [None] * 3
    assert all(item.seconds >= 0 for item in seen)
    assert [item.seconds for item in seen] == sorted(item.seconds for item in seen)
    assert video.data == fake.video


def test_result(driver: Driver, fake: FakeTriton) -> None:
    video = driver.generate(fake.address, request_id="my-request")
    assert (video.data, video.container, video.request_id) == (fake.video, "mp4", "my-request")
    assert (video.seed, video.width, video.height, video.num_frames, video.fps) == (4242, 32, 16, 5, 16)
    assert video.report == REPORT | {"request_id": "my-request"}
    assert fake.requests[0].id == "my-request"
    assert fake.metadata[0]["triton_grpc_error"] == "true"


def test_raw_frames_arrive_as_made(driver: Driver, fake: FakeTriton) -> None:
    video = driver.generate(fake.address, container="raw")
    assert (video.data, video.container) == (None, "raw")
    assert video.frames().dtype == np.uint8
    np.testing.assert_array_equal(video.frames(), FRAMES)


def test_frames_past_grpcs_own_limit(driver: Driver, fake: FakeTriton) -> None:
    large = np.zeros((9, 480, 832, 3), np.uint8)  # 10.8 MB, over 4 MB

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield respond(request, "done", 1, 1, frames=large, report=REPORT)

    fake.answer = answer
    assert driver.generate(fake.address, container="raw").frames().shape == large.shape
    with pytest.raises(ResourceExhaustedError, match="larger than max"):
        driver.generate(fake.address, client={"max_message_bytes": 1_000_000})


def test_model_of_client_and_of_request(driver: Driver, fake: FakeTriton) -> None:
    driver.generate(fake.address, client={"model": "text_to_video_14b"})
    driver.generate(fake.address, client={"model": "text_to_video_14b"}, model="other")
    assert [request.model_name for request in fake.requests] == ["text_to_video_14b", "other"]


def test_result_without_iterating_or_entering(fake: FakeTriton) -> None:
    with Client(fake.address) as client:
        assert client.stream("a").result().seed == 4242
        stream = client.stream("a")
        assert [progress.stage for progress in stream][-1] == "done"
        assert stream.result() is stream.result()
        assert list(stream) == []


@pytest.mark.parametrize("code", [code for code in STATUS_ERRORS if code is not grpc.StatusCode.UNAVAILABLE])
@pytest.mark.parametrize("after", [0, 2])
def test_statuses_become_typed_errors(driver: Driver, fake: FakeTriton, code: grpc.StatusCode, after: int) -> None:
    fake.answer = aborting(code, "SEED = -1: must be 0 to 9", after=after)
    with pytest.raises(STATUS_ERRORS[code]) as caught:
        driver.generate(fake.address, request_id="r1")
    assert type(caught.value) is STATUS_ERRORS[code]
    assert str(caught.value) == "SEED = -1: must be 0 to 9 (request r1)"
    assert caught.value.code is code
    assert len(fake.requests) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS])
def test_other_statuses_are_internal(driver: Driver, fake: FakeTriton, code: grpc.StatusCode) -> None:
    fake.answer = aborting(code, "oh")
    with pytest.raises(InternalError, match=r"oh \(request [0-9a-f]{16}\)"):
        driver.generate(fake.address)


def test_an_error_stays(fake: FakeTriton) -> None:
    fake.answer = aborting(grpc.StatusCode.INTERNAL, "oh", after=1)
    with Client(fake.address) as client, client.stream("a") as stream:
        assert next(stream).step == 1
        for _ in range(2):
            with pytest.raises(InternalError):
                next(stream)
        with pytest.raises(InternalError):
            stream.result()


def test_retry_before_the_first_response(driver: Driver, fake: FakeTriton) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if len(fake.requests) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield from fake.succeed(request, context)

    fake.answer = answer
    assert driver.generate(fake.address).seed == 4242
    assert len(fake.requests) == 3
    assert len({request.id for request in fake.requests}) == 1


def test_retries_end(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = aborting(grpc.StatusCode.UNAVAILABLE, "misconfigured")
    with pytest.raises(UnavailableError, match=r"^misconfigured"):
        driver.generate(fake.address)
    assert len(fake.requests) == 3
    with pytest.raises(UnavailableError):
        driver.generate(fake.address, client={"retries": RetryPolicy(max_attempts=1)})
    assert len(fake.requests) == 4


def test_no_retry_after_the_first_response(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = aborting(grpc.StatusCode.UNAVAILABLE, "stopping", after=1)
    with pytest.raises(UnavailableError):
        driver.generate(fake.address)
    assert len(fake.requests) == 1


def test_no_retry_of_out_of_memory(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = aborting(grpc.StatusCode.UNAVAILABLE, "[RESOURCE_EXHAUSTED] 720p needs 40 GB")
    with pytest.raises(ResourceExhaustedError, match="720p needs 40 GB"):
        driver.generate(fake.address)
    assert len(fake.requests) == 1


def test_deadline(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = fake.hang
    with pytest.raises(DeadlineExceededError, match=r"no video within 0\.3 s \(request r1\)") as caught:
        driver.generate(fake.address, timeout=0.3, request_id="r1")
    assert isinstance(caught.value, TimeoutError)
    assert fake.stream_ended.wait(10)
    with pytest.raises(DeadlineExceededError):
        driver.generate(fake.address, client={"timeout": 0.3})


def test_no_limit(driver: Driver, fake: FakeTriton) -> None:
    remaining = []

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        remaining.append(context.time_remaining())
        return fake.succeed(request, context)

    fake.answer = answer
    driver.generate(fake.address, client={"timeout": None})
    driver.generate(fake.address, timeout=math.inf)
    assert all(left is None or left > 10**8 for left in remaining)


def test_cancel_reaches_the_server(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = fake.hang
    with pytest.raises(CancelledError, match=r"cancelled by the caller \(request r1\)"):
        driver.stream(fake.address, act=lambda stream, progress: stream.cancel(), request_id="r1")
    assert fake.stream_ended.wait(10)


def test_cancel_from_another_thread(fake: FakeTriton) -> None:
    fake.answer = fake.hang
    with Client(fake.address) as client, client.stream("a") as stream:
        next(stream)
        threading.Timer(0.1, stream.cancel).start()
        with pytest.raises(CancelledError):
            stream.result()


def test_cancel_between_attempts(driver: Driver, fake: FakeTriton) -> None:
    slow = RetryPolicy(initial_delay=30, max_delay=30)
    called = threading.Event()

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        called.set()
        context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield

    fake.answer = answer
    if driver.blocking:
        with Client(fake.address, retries=slow) as client, client.stream("a") as stream:
            threading.Thread(target=lambda: (called.wait(10), time.sleep(0.05), stream.cancel())).start()
            with pytest.raises(CancelledError):
                stream.result()
        return

    async def run() -> None:
        async with AsyncClient(fake.address, retries=slow) as client, client.stream("a") as stream:
            asyncio.get_running_loop().call_later(0.2, stream.cancel)
            await stream.result()

    with pytest.raises(CancelledError):
        asyncio.run(run())


def test_leaving_early_cancels(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = fake.hang

    def leave(stream: Any, progress: Any) -> None:
        raise LookupError

    with contextlib.suppress(LookupError):
        driver.stream(fake.address, act=leave)
    assert fake.stream_ended.wait(10)


def test_a_cancelled_task_stays_cancelled_and_reaches_the_server(fake: FakeTriton) -> None:
    fake.answer = fake.hang

    async def run() -> None:
        async with AsyncClient(fake.address) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.generate("a"), 0.3)

    asyncio.run(run())
    assert fake.stream_ended.wait(10)


def test_many_at_once_on_one_client(fake: FakeTriton) -> None:
    async def run() -> list[Video]:
        async with AsyncClient(fake.address) as client:
            return await asyncio.gather(*(client.generate("a", request_id=f"r{i}") for i in range(8)))

    assert [video.request_id for video in asyncio.run(run())] == [f"r{i}" for i in range(8)]


def test_nobody_there(driver: Driver, nobody: str) -> None:
    with pytest.raises(UnreachableError, match=rf"cannot reach {nobody}: .*\(request r1\)") as caught:
        driver.generate(nobody, request_id="r1")
    assert isinstance(caught.value, ConnectionError)
    with pytest.raises(UnreachableError):
        driver.call(nobody, "status")


def test_a_listener_that_never_answers(driver: Driver) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = {"timeout": Timeout(connect=0.3, status=0.5), "retries": RetryPolicy(max_attempts=1)}
        with pytest.raises(UnreachableError):
            driver.generate(address, client=settings)


def test_a_server_that_dies_midway(driver: Driver) -> None:
    command = [sys.executable, Path(__file__).with_name("fake_triton.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with pytest.raises(UnreachableError, match=rf"the connection to {address} broke: .*\(request r1\)"):
            driver.stream(address, act=lambda stream, progress: process.kill(), request_id="r1")


def test_a_stream_that_ends_too_soon(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = lambda request, context: iter([respond(request, "denoiser", 1, 4), empty_final(request)])
    with pytest.raises(MalformedResponseError, match="without a video"):
        driver.generate(fake.address)


@pytest.mark.parametrize(
    ("settings", "header", "value"),
    [
        ({"api_key": "k1"}, "authorization", "Bearer k1"),
        ({"api_key": "k1", "api_key_header": "X-Api-Key"}, "x-api-key", "k1"),
    ],
)
def test_api_key(driver: Driver, fake: FakeTriton, settings: dict[str, str], header: str, value: str) -> None:
    driver.generate(fake.address, client=settings)
    driver.call(fake.address, "status", client=settings)
    assert [metadata.get(header) for metadata in fake.metadata] == [value, value]


def test_a_wrong_api_key(driver: Driver, fake: FakeTriton) -> None:
    fake.answer = aborting(grpc.StatusCode.UNAUTHENTICATED, "wrong key")
    with pytest.raises(UnauthenticatedError, match="wrong key") as caught:
        driver.generate(fake.address, client={"api_key": "s3cret"})
    assert "s3cret" not in str(caught.value)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def secure(fake: FakeTriton, authority: trustme.CA, *, mutual: bool, name: str = "127.0.0.1") -> grpc.Server:
    issued = authority.issue_cert(name)
    credentials = grpc.ssl_server_credentials(
        [(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())],
        root_certificates=authority.cert_pem.bytes() if mutual else None,
        require_client_auth=mutual,
    )
    return start_server(fake, credentials)


def test_tls(driver: Driver, mp4: bytes, authority: trustme.CA, tmp_path) -> None:
    fake = FakeTriton(mp4)
    server = secure(fake, authority, mutual=False)
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    one_try = {"retries": RetryPolicy(max_attempts=1), "timeout": Timeout(status=2, connect=1)}
    assert driver.generate(fake.address, client={"tls": TLS(ca=tmp_path / "ca.pem")}).seed == 4242
    stranger = TLS(ca=trustme.CA().cert_pem.bytes())
    for tls in (None, stranger):
        with pytest.raises(UnreachableError):
            driver.generate(fake.address, client={"tls": tls, **one_try})
    server.stop(None).wait()


def test_mutual_tls(driver: Driver, mp4: bytes, authority: trustme.CA) -> None:
    fake = FakeTriton(mp4)
    server = secure(fake, authority, mutual=True)
    ca, mine = authority.cert_pem.bytes(), authority.issue_cert("client@example.org")
    tls = TLS(ca=ca, cert=mine.cert_chain_pems[0].bytes(), key=mine.private_key_pem.bytes())
    assert driver.generate(fake.address, client={"tls": tls}).seed == 4242
    with pytest.raises(UnreachableError):
        driver.generate(
            fake.address,
            client={
                "tls": TLS(ca=ca),
                "retries": RetryPolicy(max_attempts=1),
                "timeout": Timeout(status=2, connect=1),
            },
        )
    server.stop(None).wait()


def test_server_name(driver: Driver, mp4: bytes, authority: trustme.CA) -> None:
    fake = FakeTriton(mp4)
    server = secure(fake, authority, mutual=False, name="video.example.org")
    tls = TLS(ca=authority.cert_pem.bytes(), server_name="video.example.org")
    assert driver.generate(fake.address, client={"tls": tls}).seed == 4242
    server.stop(None).wait()


def test_status(driver: Driver, fake: FakeTriton) -> None:
    fake.models += [
        ("broken", "1", "UNAVAILABLE", "no weights"),
        ("two", "1", "READY", ""),
        ("two", "2", "LOADING", ""),
    ]
    status = driver.call(fake.address, "status")
    assert isinstance(status, ServerStatus)
    assert (status.live, status.ready, status.name, status.version) == (True, True, "triton", "2.51.0")
    assert [(model.name, model.ready, model.state, model.versions) for model in status.models] == [
        ("broken", False, "UNAVAILABLE", ("1",)),
        ("denoiser", True, "READY", ("1",)),
        ("text_to_video", True, "READY", ("1",)),
        ("two", True, "LOADING", ("1", "2")),
    ]
    assert status.models[0].reason == "no weights"


def test_wait_ready(driver: Driver, fake: FakeTriton, nobody: str) -> None:
    fake.ready = False
    threading.Timer(0.3, lambda: setattr(fake, "ready", True)).start()
    driver.call(fake.address, "wait_ready", 20)
    fake.ready = False
    with pytest.raises(DeadlineExceededError, match=r"not ready within 0\.3 s: the server is not ready"):
        driver.call(fake.address, "wait_ready", 0.3)
    with pytest.raises(DeadlineExceededError, match="cannot reach"):
        driver.call(nobody, "wait_ready", 0.3)


def test_a_closed_client_says_so(fake: FakeTriton) -> None:
    client = Client(fake.address)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("a")

    async def run() -> None:
        asynchronous = AsyncClient(fake.address)
        await asynchronous.close()
        with pytest.raises(RuntimeError, match="closed"):
            await asynchronous.generate("a")

    asyncio.run(run())


def test_closing_ends_what_runs(fake: FakeTriton) -> None:
    fake.answer = fake.hang
    client = Client(fake.address)
    stream = client.stream("a")
    next(stream)
    client.close()
    with pytest.raises(TurboDiffusionError):
        stream.result()
    assert fake.stream_ended.wait(10)


def test_bad_values_never_reach_the_server(driver: Driver, fake: FakeTriton) -> None:
    with pytest.raises(TypeError, match="seed"):
        driver.generate(fake.address, seed="7")
    assert fake.requests == []


def test_the_server_checks_ranges(driver: Driver, fake: FakeTriton) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"NUM_STEPS = {read_inputs(request)['NUM_STEPS']}: must be 1 to 4"
        )
        yield

    fake.answer = answer
    with pytest.raises(InvalidArgumentError, match="NUM_STEPS = 9"):
        driver.generate(fake.address, num_steps=9)
