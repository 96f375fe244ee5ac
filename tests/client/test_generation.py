"""The course of a generation, with a clock of its own and no I/O."""

import grpc
import pytest
from fake_triton import REPORT, empty_final, respond
from tritonclient.grpc import service_pb2

from turbo_client import (
    DeadlineExceededError,
    GenerationRequest,
    InternalError,
    MalformedResponseError,
    ResourceExhaustedError,
    RetryPolicy,
    UnavailableError,
)
from turbo_client._errors import RpcStatus
from turbo_client._generation import Generation, Progress

UNAVAILABLE = RpcStatus(grpc.StatusCode.UNAVAILABLE, "restarting")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, *, timeout: float | None = None, retries: RetryPolicy | None = None, **request) -> Generation:
    generation = Generation(
        GenerationRequest("a fox", **request),
        model="text_to_video",
        timeout=timeout,
        retries=retries or RetryPolicy(),
        clock=clock,
    )
    generation.begin_attempt()
    return generation


def step(generation: Generation, clock: Clock, now: float, stage: str, step: int, num_steps: int) -> Progress:
    clock.now = 100.0 + now
    progress = generation.receive(respond(generation.message, stage, step, num_steps))
    assert progress is not None
    return progress


def test_estimates_come_from_the_mean_step(clock: Clock) -> None:
    generation = make(clock)
    # The first step includes 8 s of queueing: all there is to go by, then forgotten.
    assert step(generation, clock, 9, "denoiser", 1, 4).eta_seconds == pytest.approx(27)
    assert step(generation, clock, 10, "denoiser", 2, 4).eta_seconds == pytest.approx(2)
    assert step(generation, clock, 12, "denoiser", 3, 4).eta_seconds == pytest.approx(1.5)
    last = step(generation, clock, 13, "denoiser", 4, 4)
    assert (last.eta_seconds, last.seconds) == (0, pytest.approx(13))
    # A new stage is timed from the end of the one before.
    assert step(generation, clock, 13.5, "vae_decoder", 1, 9).eta_seconds == pytest.approx(4)


@pytest.mark.parametrize(("at", "of"), [(0, 4), (-1, 4), (5, 4), (0, 0)])
def test_steps_that_make_no_sense_have_no_estimate(clock: Clock, at: int, of: int) -> None:
    assert step(make(clock), clock, 1, "denoiser", at, of).eta_seconds is None


def test_a_repeated_step_has_no_estimate(clock: Clock) -> None:
    generation = make(clock)
    step(generation, clock, 1, "denoiser", 1, 4)
    assert step(generation, clock, 2, "denoiser", 1, 4).eta_seconds is None


def test_deadline_spans_all_attempts(clock: Clock) -> None:
    generation = Generation(
        GenerationRequest("a"), model="m", timeout=10, retries=RetryPolicy(max_attempts=5), clock=clock
    )
    assert generation.begin_attempt() == 10
    clock.now += 4
    assert generation.begin_attempt() == 6
    clock.now += 40
    assert generation.begin_attempt() == 0
    assert generation.num_attempts == 3


def test_a_requests_timeout_wins(clock: Clock) -> None:
    assert (
        Generation(
            GenerationRequest("a", timeout=3), model="m", timeout=10, retries=RetryPolicy(), clock=clock
        ).begin_attempt()
        == 3
    )
    for timeout in (None, 10.0):
        assert (
            Generation(
                GenerationRequest("a", timeout=float("inf")),
                model="m",
                timeout=timeout,
                retries=RetryPolicy(),
                clock=clock,
            ).begin_attempt()
            is None
        )


def test_unavailable_is_retried_before_the_first_response(clock: Clock) -> None:
    generation = make(clock)
    for _ in range(2):
        assert isinstance(generation.fail(UNAVAILABLE), float)
        generation.begin_attempt()
    assert isinstance(generation.fail(UNAVAILABLE), UnavailableError)


def test_nothing_is_retried_after_the_first_response(clock: Clock) -> None:
    generation = make(clock)
    step(generation, clock, 1, "denoiser", 1, 4)
    assert isinstance(generation.fail(UNAVAILABLE), UnavailableError)


def test_out_of_memory_is_not_retried(clock: Clock) -> None:
    status = RpcStatus(grpc.StatusCode.UNAVAILABLE, "[RESOURCE_EXHAUSTED] too large")
    assert isinstance(make(clock).fail(status), ResourceExhaustedError)


def test_other_statuses_are_not_retried(clock: Clock) -> None:
    assert isinstance(make(clock).fail(RpcStatus(grpc.StatusCode.INTERNAL, "no")), InternalError)


def test_no_retry_past_the_deadline(clock: Clock) -> None:
    generation = make(clock, timeout=1)
    clock.now += 0.95
    assert isinstance(generation.fail(UNAVAILABLE), UnavailableError)


def test_deadline_says_how_long_it_was(clock: Clock) -> None:
    error = make(clock, timeout=2.5, request_id="r1").fail(RpcStatus(grpc.StatusCode.DEADLINE_EXCEEDED, ""))
    assert isinstance(error, DeadlineExceededError)
    assert str(error) == "no video within 2.5 s (request r1)"


def test_a_failure_after_the_video_no_longer_matters(clock: Clock) -> None:
    generation = make(clock)
    generation.receive(respond(generation.message, "done", 1, 1, video=b"mp4", report=REPORT))
    assert generation.fail(UNAVAILABLE) is None
    assert generation.result().seed == 4242


def test_a_stream_that_ends_without_a_video_is_an_error(clock: Clock) -> None:
    generation = make(clock, request_id="r1")
    assert generation.receive(empty_final(generation.message)) is None
    with pytest.raises(MalformedResponseError, match=r"without a video \(request r1\)"):
        generation.result()


def test_an_error_message_in_place_of_a_status(clock: Clock) -> None:
    with pytest.raises(InternalError, match="went wrong"):
        make(clock).receive(service_pb2.ModelStreamInferResponse(error_message="went wrong"))


def test_request_ids_are_drawn_anew(clock: Clock) -> None:
    one, other = make(clock), make(clock)
    assert one.request_id != other.request_id
    assert one.message.id == one.request_id
