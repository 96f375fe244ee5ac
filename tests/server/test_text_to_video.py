"""The main job on a real Triton server: a prompt goes in over gRPC, an MP4 comes out."""

from __future__ import annotations

import io
import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from PIL import Image

from turbo_backend.parameters import Delivery
from turbo_backend.pipeline import Pipeline
from turbo_backend.settings import Settings
from turbo_client import Client, InvalidArgumentError, read_manifest

if TYPE_CHECKING:
    from turbo_backend.server.process import TritonServer

pytestmark = pytest.mark.server

#: Small enough to run many of.
SHORT = {"num_frames": 17, "num_steps": 2}


@pytest.fixture(scope="module")
def client(triton: TritonServer):
    with Client(triton.grpc_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_settings(Settings.from_environment({"TURBO_DEVICE": "cpu"}))


def decode(mp4: bytes) -> np.ndarray:
    with av.open(io.BytesIO(mp4)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_prompt_becomes_a_playable_mp4(client: Client) -> None:
    video = client.generate("A red fox runs through snow", seed=7, num_frames=33, num_steps=4)
    with av.open(io.BytesIO(video.data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (256, 144, 33)
        assert stream.average_rate == 16
    assert video.data.index(b"moov") < video.data.index(b"mdat"), "the index comes first, for browsers"
    assert decode(video.data).std() > 1
    report = video.report
    assert video.seed == report["seed"] == 7
    assert set(report["stages"]) == {"text_encoder", "denoiser", "vae_decoder", "video_encoder"}
    assert len(report["stages"]["denoiser"]["step_milliseconds"]) == 4
    assert report["attention"] == {"type": "sagesla", "provider": "reference", "block_q": 128, "block_k": 64}
    assert report["video"]["bytes"] == len(video.data)


@pytest.mark.parametrize("attention_type", ["original", "sla", "sagesla"])
def test_ensemble_equals_the_pipeline_exactly(client: Client, pipeline: Pipeline, attention_type: str) -> None:
    values = {**SHORT, "seed": 11, "attention_type": attention_type}
    served = client.generate("雪地里的红狐狸 runs", **values)
    alone = pipeline.generate("雪地里的红狐狸 runs", **values)
    assert served.data == alone.mp4
    raw = client.generate("雪地里的红狐狸 runs", container="raw", **values)
    direct = pipeline.generate("雪地里的红狐狸 runs", delivery=Delivery(container="raw", preview=False), **values)
    np.testing.assert_array_equal(raw.frames(), direct.frames)


def test_progress_comes_in_order_with_previews(client: Client) -> None:
    with client.stream("A blue car", seed=3, num_steps=3, num_frames=17, preview=True) as stream:
        seen = list(stream)
        video = stream.result()
    steps = [(p.stage, p.step, p.num_steps) for p in seen if p.stage in ("denoiser", "vae_decoder")]
    assert steps == [
        *[("denoiser", step, 3) for step in (1, 2, 3)],
        *[("vae_decoder", chunk, 5) for chunk in (1, 2, 3, 4, 5)],
    ]
    previews = [p.preview for p in seen if p.stage == "denoiser"]
    for preview in previews:
        image = Image.open(io.BytesIO(preview))
        assert image.format == "JPEG"
        assert image.size == (256, 144)
    assert all(not p.preview for p in seen if p.stage == "vae_decoder")
    assert video.report["video"]["num_frames"] == 17
    with client.stream("A blue car", **SHORT, preview=False) as stream:
        assert all(not p.preview for p in stream)


def test_eight_unlike_requests_at_once_give_what_each_gives_alone(client: Client) -> None:
    requests = [
        {"prompt": "a", "num_steps": 1, "num_frames": 17, "seed": 1},
        {"prompt": "b cat", "num_steps": 1, "num_frames": 17, "seed": 2, "sigma_max": 120.0},
        {"prompt": "红色的汽车", "num_steps": 2, "num_frames": 17, "seed": 3},
        {"prompt": "d", "num_steps": 2, "num_frames": 17, "seed": 4, "attention_type": "original"},
        {"prompt": "e", "num_steps": 2, "num_frames": 21, "seed": 5, "aspect_ratio": "1:1"},
        {"prompt": "f", "num_steps": 3, "num_frames": 17, "seed": 6, "ode": True},
        {"prompt": "g", "num_steps": 2, "num_frames": 17, "seed": 7, "sla_topk": 0.3},
        {"prompt": "h", "num_steps": 2, "num_frames": 17, "seed": 8, "attention_type": "sla"},
    ]
    alone = [client.generate(**request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: client.generate(**request), requests))
    for first, second in zip(alone, together, strict=True):
        assert first.data == second.data


def test_a_true_batch_gives_each_request_its_own_video(client: Client) -> None:
    requests = [{"prompt": f"prompt number {i} {'long ' * i}", "seed": 100 + i, **SHORT} for i in range(6)]
    alone = [client.generate(**request) for request in requests]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: client.generate(**request), requests))
    assert max(video.report["stages"]["denoiser"]["batch_size"] for video in together) > 1
    assert [video.data for video in together] == [video.data for video in alone]
    assert len({video.data for video in alone}) == 6


def test_seed_zero_draws_one_and_reports_it(client: Client) -> None:
    first, second = (client.generate("a bird", seed=0, **SHORT) for _ in range(2))
    assert first.seed != second.seed
    again = client.generate("a bird", seed=first.seed, **SHORT)
    assert again.data == first.data


def test_manifest_is_enough_to_make_the_video_again(client: Client, pipeline: Pipeline) -> None:
    video = client.generate('一只 cat & a "dog"', seed=9, sla_topk=0.25, **SHORT)
    manifest = read_manifest(video.data)
    assert manifest.prompt == '一只 cat & a "dog"'
    assert manifest.seed == 9
    parameters = {
        key: manifest.parameters[key]
        for key in (
            "num_steps",
            "num_frames",
            "resolution",
            "aspect_ratio",
            "sigma_max",
            "attention_type",
            "sla_topk",
            "ode",
        )
    }
    assert pipeline.generate(manifest.prompt, seed=manifest.seed, **parameters).mp4 == video.data


def test_generic_triton_client_needs_no_sdk(triton: TritonServer) -> None:
    client = triton_grpc.InferenceServerClient(triton.grpc_url)
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    prompt = triton_grpc.InferInput("PROMPT", [1, 1], "BYTES")
    prompt.set_data_from_numpy(np.array([[b"a green ball"]], np.object_))
    frames = triton_grpc.InferInput("NUM_FRAMES", [1, 1], "INT32")
    frames.set_data_from_numpy(np.array([[17]], np.int32))
    client.async_stream_infer("text_to_video", [prompt, frames])
    while True:
        result, error = answers.get(timeout=120)
        assert error is None, error
        if result.as_numpy("STAGE")[0, 0] == b"done":
            break
    client.stop_stream()
    client.close()
    assert result.as_numpy("VIDEO")[0, 0][4:8] == b"ftyp"
    assert json.loads(result.as_numpy("REPORT")[0, 0])["video"]["num_frames"] == 17


BAD = [
    ({"prompt": ""}, "PROMPT"),
    ({"prompt": " \u3000\n"}, "PROMPT"),
    ({"prompt": "x" * 600}, "PROMPT"),
    ({"prompt": "x" * 100_000}, "PROMPT"),
    ({"num_steps": 0}, "NUM_STEPS"),
    ({"num_steps": 5}, "NUM_STEPS"),
    ({"num_steps": -1}, "NUM_STEPS"),
    ({"num_frames": 16}, "NUM_FRAMES"),
    ({"num_frames": 0}, "NUM_FRAMES"),
    ({"num_frames": 513}, "NUM_FRAMES"),
    ({"seed": -1}, "SEED"),
    ({"sigma_max": float("nan")}, "SIGMA_MAX"),
    ({"sigma_max": 0.0}, "SIGMA_MAX"),
    ({"sigma_max": float("inf")}, "SIGMA_MAX"),
    ({"sla_topk": 0.0}, "SLA_TOPK"),
    ({"sla_topk": 1.01}, "SLA_TOPK"),
    ({"attention_type": "flash"}, "ATTENTION_TYPE"),
    ({"resolution": "480p"}, "RESOLUTION"),
    ({"aspect_ratio": "2:1"}, "ASPECT_RATIO"),
    ({"fps": 0}, "fps"),
    ({"fps": 61}, "fps"),
]


@pytest.mark.parametrize(("values", "field"), BAD, ids=[f"{f}-{i}" for i, (_, f) in enumerate(BAD)])
def test_bad_value_is_refused_by_name(client: Client, values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate(**{"prompt": "a cat", **SHORT, **values})
    assert field in str(caught.value)


def test_bad_neighbour_harms_nobody(client: Client) -> None:
    good = {"prompt": "a good one", "seed": 21, **SHORT}
    expected = client.generate(**good)
    outcomes: list[object] = [None] * 6

    def run(index: int) -> None:
        try:
            outcomes[index] = client.generate(**(good if index % 2 else {**good, "sigma_max": -1.0})).data
        except InvalidArgumentError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, outcome in enumerate(outcomes):
        if index % 2:
            assert outcome == expected.data
        else:
            assert isinstance(outcome, InvalidArgumentError)
