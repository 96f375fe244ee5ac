"""Requests that pass one another, are given up or refused, on a real Triton server. Steps are counted, not seconds."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import metrics
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from turbo_backend.pipeline import Pipeline
from turbo_backend.server.process import TritonServer
from turbo_backend.settings import Settings, list_variables
from turbo_client import Client, ResourceExhaustedError

pytestmark = pytest.mark.server

#: Its steps take so long that others can come and go between them.
LONG = {"NUM_FRAMES": 129, "NUM_STEPS": 4}
SHORT = {"NUM_FRAMES": 5, "NUM_STEPS": 2}
TYPES = {"NUM_FRAMES": ("INT32", np.int32), "NUM_STEPS": ("INT32", np.int32), "SEED": ("INT64", np.int64)}

#: Metric of texts that were embedded.
_TEXTS = ("nv_inference_request_success", 'model="text_encoder"')

Answer = tuple[triton_grpc.InferResult | None, InferenceServerException | None]


class Stream:
    """A stream of any Triton client, with the answers to one request."""

    def __init__(self, server: TritonServer, **values: int) -> None:
        self._client = triton_grpc.InferenceServerClient(server.grpc_url)
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._client.start_stream(
            lambda result, error: self._answers.put((result, error)), headers={"triton_grpc_error": "true"}
        )
        self._values = values

    def send(self, request_id: str = "", **parameters: object) -> None:
        prompt = triton_grpc.InferInput("PROMPT", [1, 1], "BYTES")
        prompt.set_data_from_numpy(np.array([[b"a green ball"]], np.object_))
        inputs = [prompt]
        for name, value in self._values.items():
            datatype, dtype = TYPES[name]
            inputs.append(triton_grpc.InferInput(name, [1, 1], datatype))
            inputs[-1].set_data_from_numpy(np.array([[value]], dtype))
        self._client.async_stream_infer("text_to_video", inputs, request_id=request_id, parameters=parameters)

    def answers(self) -> Iterator[tuple[str, int]]:
        """(stage, step) until the video is there.

        Raises:
            InferenceServerException: the server ended the request.
        """
        while True:
            result, error = self._answers.get(timeout=120)
            if error is not None:
                raise error
            assert result is not None
            stage = result.as_numpy("STAGE")[0, 0].decode()
            yield stage, int(result.as_numpy("STEP")[0, 0])
            if stage == "done":
                return

    def cut(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


@contextmanager
def streaming(server: TritonServer, **values: int) -> Iterator[Stream]:
    stream = Stream(server, **values)
    try:
        yield stream
    finally:
        stream.cut()


def answers_once_decoded(stream: Stream) -> Iterator[tuple[str, int]]:
    """Its answers after that to the first decoded chunk."""
    answers = stream.answers()
    while next(answers) != ("vae_decoder", 1):
        pass
    return answers


def count(server: TritonServer, metric: str, label: str = "") -> float:
    return metrics.count(server.metrics_url, metric, label)


def wait_until(holds: Callable[[], bool]) -> None:
    """Looks again and again; pytest's own limit ends it."""
    pause = threading.Event()
    while not holds():
        pause.wait(0.02)


def num_ended(server: TritonServer) -> float:
    return count(server, "turbo_denoiser_requests")


def test_a_cut_stream_ends_its_denoising(triton: TritonServer) -> None:
    steps, ended = count(triton, "turbo_denoiser_steps"), num_ended(triton)
    cancelled = count(triton, "turbo_denoiser_requests", "cancelled")
    with streaming(triton, **LONG) as stream:
        stream.send()
        assert next(stream.answers()) == ("denoiser", 1)
    wait_until(lambda: num_ended(triton) == ended + 1)
    assert count(triton, "turbo_denoiser_requests", "cancelled") == cancelled + 1
    assert count(triton, "turbo_denoiser_steps") - steps <= 2, "the step that was told, and the one that ran then"


def test_a_cut_stream_that_waits_leaves_before_the_running_step_is_over(triton: TritonServer) -> None:
    cancelled = count(triton, "turbo_denoiser_requests", "cancelled")
    with streaming(triton, **LONG) as running:
        running.send()
        assert next(running.answers()) == ("denoiser", 1)
        steps, texts = count(triton, "turbo_denoiser_steps"), count(triton, *_TEXTS)
        with streaming(triton, **LONG) as waiting:
            waiting.send()
            wait_until(lambda: count(triton, *_TEXTS) == texts + 1)
        wait_until(lambda: count(triton, "turbo_denoiser_requests", "cancelled") == cancelled + 1)
        assert count(triton, "turbo_denoiser_steps") - steps <= 2, "what ran then, and what had begun by the cut"
    wait_until(lambda: count(triton, "turbo_denoiser_requests", "cancelled") == cancelled + 2)


@pytest.mark.parametrize("request_id", ["mine", "../job 7/ü"])
def test_a_request_is_cancelled_by_its_id(triton: TritonServer, request_id: str) -> None:
    steps = count(triton, "turbo_denoiser_steps")
    with streaming(triton, **LONG) as stream:
        stream.send(request_id)
        answers = stream.answers()
        assert next(answers) == ("denoiser", 1)
        triton.cancellations.request(request_id)
        with pytest.raises(InferenceServerException) as caught:
            list(answers)
    assert caught.value.status() == "StatusCode.CANCELLED"
    assert "was cancelled after" in str(caught.value)
    assert count(triton, "turbo_denoiser_steps") - steps <= 2, "the step that ran, and no other"
    assert not triton.cancellations.is_requested(request_id)


def test_one_that_waits_is_cancelled_before_the_running_step_is_over(triton: TritonServer) -> None:
    with streaming(triton, **LONG) as running, streaming(triton, **LONG) as waiting:
        running.send()
        running_answers = running.answers()
        assert next(running_answers) == ("denoiser", 1)
        steps = count(triton, "turbo_denoiser_steps")
        triton.cancellations.request("waits")
        waiting.send("waits")
        with pytest.raises(InferenceServerException, match="was cancelled after 0 of 4 steps"):
            list(waiting.answers())
        assert count(triton, "turbo_denoiser_steps") - steps <= 1


def test_a_request_is_cancelled_while_its_video_is_decoded(triton: TritonServer) -> None:
    with streaming(triton, NUM_FRAMES=129, NUM_STEPS=1) as stream:
        stream.send("decoding")
        answers = answers_once_decoded(stream)
        triton.cancellations.request("decoding")
        with pytest.raises(InferenceServerException) as caught:
            assert ("vae_decoder", 33) not in set(answers), "the last of its chunks"
    assert caught.value.status() == "StatusCode.CANCELLED"
    assert not triton.cancellations.is_requested("decoding")


def test_a_cut_stream_ends_its_decoding(triton: TritonServer) -> None:
    cancelled = count(triton, "turbo_vae_decoder_requests", "cancelled")
    chunks = count(triton, "turbo_vae_decoder_chunks")
    with streaming(triton, NUM_FRAMES=129, NUM_STEPS=1) as stream:
        stream.send()
        answers_once_decoded(stream)
    wait_until(lambda: count(triton, "turbo_vae_decoder_requests", "cancelled") == cancelled + 1)
    assert count(triton, "turbo_vae_decoder_chunks") - chunks < 33


def test_a_cut_stream_leaves_the_queue_of_the_decoder_before_its_turn(triton: TritonServer) -> None:
    cancelled = count(triton, "turbo_vae_decoder_requests", "cancelled")
    long, short = {"NUM_FRAMES": 129, "NUM_STEPS": 1}, {"NUM_FRAMES": 5, "NUM_STEPS": 1}
    with streaming(triton, **long) as decoded:
        decoded.send()
        answers = answers_once_decoded(decoded)
        with streaming(triton, **short) as waiting:
            waiting.send()
            assert next(waiting.answers()) == ("denoiser", 1)
        told = 0
        while count(triton, "turbo_vae_decoder_requests", "cancelled") == cancelled:
            stage, told = next(answers)
            assert stage == "vae_decoder", "it was given up before the other's video was done"
        assert list(answers)[-1][0] == "done"
    assert told < 33


def test_a_draft_passes_a_final_between_its_steps(triton: TritonServer) -> None:
    with streaming(triton, **LONG) as final, streaming(triton, **SHORT) as draft:
        final.send()
        final_answers = final.answers()
        assert next(final_answers) == ("denoiser", 1)
        draft.send()
        assert list(draft.answers())[-1] == ("done", 2)
        assert ("denoiser", 4) in set(final_answers), "the final is done after it"


def test_priority_and_deadline_are_checked_by_name(triton: TritonServer) -> None:
    for parameters, says in (
        ({"priority_level": 10}, r"priority_level = 10: must be 0 \(most urgent\) to 9"),
        ({"deadline_ms": 0}, "deadline_ms = 0: must be 1 to"),
        ({"durable": 1}, "durable = 1: must be true or false"),
    ):
        with streaming(triton, **SHORT) as stream:
            stream.send(**parameters)
            with pytest.raises(InferenceServerException, match=says) as caught:
                list(stream.answers())
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_what_cannot_be_done_in_time_is_refused_without_a_step(triton: TritonServer) -> None:
    steps = count(triton, "turbo_denoiser_steps")
    with streaming(triton, **LONG) as stream:
        stream.send(deadline_ms=1)
        with pytest.raises(InferenceServerException, match=r"\[DEADLINE_EXCEEDED\] deadline_ms = 1: .* \d+ ms"):
            list(stream.answers())
    assert count(triton, "turbo_denoiser_steps") == steps
    assert count(triton, "turbo_denoiser_requests", "deadline") >= 1


def test_eight_unlike_requests_give_what_the_pipeline_gives(triton: TritonServer) -> None:
    requests = [
        {"prompt": "a", "num_steps": 1, "seed": 1},
        {"prompt": "b", "num_steps": 4, "seed": 2, "sigma_max": 120.0},
        {"prompt": "红色的汽车", "num_steps": 2, "seed": 3, "ode": True},
        {"prompt": "d", "num_steps": 3, "seed": 4, "attention_type": "original"},
        {"prompt": "e", "num_steps": 2, "seed": 5, "attention_type": "original", "aspect_ratio": "1:1"},
        {"prompt": "f", "num_steps": 4, "seed": 6},
        {"prompt": "g", "num_steps": 2, "seed": 7, "sla_topk": 0.3},
        {"prompt": "h", "num_steps": 3, "seed": 8, "attention_type": "sla"},
    ]
    with Client(triton.grpc_url, timeout=120) as client, ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda request: client.generate(**request, num_frames=9), requests))
    pipeline = Pipeline.from_settings(Settings.from_environment({"TURBO_DEVICE": "cpu"}))
    for request, video in zip(requests, served, strict=True):
        assert video.data == pipeline.generate(**request, num_frames=9).mp4
    assert max(video.report["stages"]["denoiser"]["batch_size"] for video in served) > 1


def test_a_small_queue_refuses_and_a_server_stops_after_cut_streams() -> None:
    environment = {**{variable.name: "" for variable in list_variables()}, "TURBO_DEVICE": "cpu"}
    environment["TURBO_MAX_QUEUE_SIZE"] = "2"
    server = TritonServer(environment=environment, ready_timeout=120)
    server.start()
    try:
        with Client(server.grpc_url, timeout=120) as client, ThreadPoolExecutor(8) as pool:

            def run(seed: int) -> bytes | ResourceExhaustedError:
                try:
                    return client.generate("a fox", seed=seed, num_frames=5, num_steps=2).data
                except ResourceExhaustedError as error:
                    return error

            outcomes = list(pool.map(run, range(1, 17)))
            refused = [outcome for outcome in outcomes if isinstance(outcome, ResourceExhaustedError)]
            assert refused
            assert all("requests wait or run already" in str(error) for error in refused)
            assert len(refused) < len(outcomes)
            for seed, outcome in zip(itertools.count(1), outcomes):
                if isinstance(outcome, bytes):
                    assert run(seed) == outcome, "who was let in was not harmed"
        ended = num_ended(server)
        for _ in range(2):
            with streaming(server, **LONG) as stream:
                stream.send()
                next(stream.answers())
        wait_until(lambda: num_ended(server) == ended + 2)
    finally:
        assert server.stop() == 0, "nothing was left in flight"
