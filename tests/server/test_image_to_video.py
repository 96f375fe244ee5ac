"""Image to video on a real Triton server: image and prompt go in over gRPC, an MP4 comes out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import av
import grpc
import numpy as np
import pytest
from PIL import Image
from processes import find_processes
from tritonclient.grpc import service_pb2, service_pb2_grpc

from turbo_backend.parameters import Delivery
from turbo_backend.pipeline import Pipeline
from turbo_backend.server.process import TritonServer
from turbo_backend.settings import Settings, list_variables
from turbo_client import (
    AlreadyExistsError,
    Client,
    InvalidArgumentError,
    ManifestError,
    NotFoundError,
    UnavailableError,
    read_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.server

SHORT = {"num_frames": 9, "num_steps": 3}
ENVIRONMENT = {"TURBO_DEVICE": "cpu", "TURBO_MODEL": "tiny-I2V"}


def picture(width: int = 160, height: int = 90, *, seed: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    unset = {variable.name: "" for variable in list_variables()}
    folder = tmp_path_factory.mktemp("triton")
    environment = {**unset, **ENVIRONMENT, "TURBO_JOB_STORE": str(folder / "jobs")}
    with TritonServer(
        environment=environment, log_path=folder / "server.log", ready_timeout=240, restarts=5, restart_grace=0.5
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=240) as client:
        client.wait_ready()
        yield client


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_settings(Settings.from_environment(ENVIRONMENT))


def test_image_and_prompt_become_a_playable_mp4(client: Client) -> None:
    with client.stream("The cat turns", image=picture(kind="JPEG"), seed=7, num_frames=9, preview=True) as stream:
        seen = [(progress.stage, progress.step, bool(progress.preview)) for progress in stream]
        video = stream.result()
    assert seen[:4] == [("denoiser", step, True) for step in (1, 2, 3, 4)]
    with av.open(io.BytesIO(video.data)) as container:
        stream_info = container.streams.video[0]
        assert (stream_info.width, stream_info.height, stream_info.frames) == (256, 144, 9)
    report = video.report
    assert report["stages"]["denoiser"]["experts"] == [0, 0, 1, 1]
    assert set(report["stages"]) == {"text_encoder", "image_encoder", "denoiser", "vae_decoder", "video_encoder"}
    assert report["parameters"]["boundary"] == 0.9
    assert report["parameters"]["sigma_max"] == 200.0
    assert report["image"]["format"] == "JPEG"
    assert report["notes"] == []


@pytest.mark.parametrize(
    "values",
    [{}, {"ode": True, "boundary": 0.95, "attention_type": "sla"}, {"adaptive_resolution": True, "fit": "crop"}],
)
def test_ensemble_equals_the_pipeline_exactly(client: Client, pipeline: Pipeline, values: dict[str, object]) -> None:
    image = picture(90, 160)
    served = client.generate("雪 runs", image=image, seed=11, **SHORT, **values)
    alone = pipeline.generate("雪 runs", image=image, seed=11, **SHORT, **values)
    assert served.data == alone.mp4
    if values.get("adaptive_resolution"):
        assert (served.width, served.height) == (144, 256)


def test_cache_and_its_metric(client: Client, server: TritonServer) -> None:
    image = picture(seed=99)
    first, second = (client.generate("a", image=image, seed=seed, **SHORT) for seed in (1, 2))
    assert not first.report["stages"]["image_encoder"]["cache_hit"]
    assert second.report["stages"]["image_encoder"]["cache_hit"]
    with urllib.request.urlopen(server.metrics_url) as answer:  # noqa: S310 - our own server on loopback
        metrics = answer.read().decode()
    assert 'turbo_image_cache_lookups{outcome="hit"}' in metrics
    assert 'turbo_image_cache_lookups{outcome="miss"}' in metrics


def test_unlike_requests_at_once_give_what_each_gives_alone(client: Client) -> None:
    requests = [
        {"prompt": "a", "image": picture(), "seed": 1, "num_steps": 1},
        {"prompt": "b", "image": picture(seed=2), "seed": 2, "num_steps": 3},
        {"prompt": "c", "image": picture(seed=3), "seed": 3, "num_steps": 3, "boundary": 0.95},
        {"prompt": "d", "image": picture(seed=4), "seed": 4, "num_steps": 3},
        {"prompt": "e", "image": picture(90, 90), "seed": 5, "num_steps": 2, "adaptive_resolution": True},
    ]
    alone = [client.generate(num_frames=9, **request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: client.generate(num_frames=9, **request), requests))
    assert [video.data for video in together] == [video.data for video in alone]


BAD = [
    ({"image": b""}, "IMAGE"),
    ({"image": b"not an image"}, "IMAGE"),
    ({"image": picture()[:-300]}, "IMAGE"),
    ({"image": picture(1, 1)}, "IMAGE"),
    ({"image": picture(800, 16), "adaptive_resolution": True, "resolution": "720p"}, "RESOLUTION"),
    ({"image": picture(20_001, 16)}, "IMAGE"),
    ({"image": picture() + bytes(21 * 2**20)}, "IMAGE"),
    ({"boundary": 0.49}, "BOUNDARY"),
    ({"boundary": float("nan")}, "BOUNDARY"),
    ({"fit": "pad"}, "FIT"),
    ({"num_frames": 10}, "NUM_FRAMES"),
    ({"num_steps": 5}, "NUM_STEPS"),
    ({"prompt": ""}, "PROMPT"),
]


@pytest.mark.parametrize(("values", "field"), BAD, ids=[f"{f}-{i}" for i, (_, f) in enumerate(BAD)])
def test_bad_value_is_refused_by_name(client: Client, values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate(**{"prompt": "a cat", "image": picture(), **SHORT, **values})
    assert field in str(caught.value)


def test_request_without_image_is_refused(server: TritonServer, client: Client) -> None:
    with pytest.raises((InvalidArgumentError, NotFoundError, UnavailableError), match="text_to_video"):
        client.generate("a cat", **SHORT)  # this server offers image_to_video alone
    request = service_pb2.ModelInferRequest(model_name="image_to_video", id="x")
    request.inputs.add(name="PROMPT", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(b"\x01\0\0\0a")
    with grpc.insecure_channel(server.grpc_url) as channel:
        (answer,) = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=60)
    assert "IMAGE" in answer.error_message


def test_image_sent_to_text_to_video_is_refused(triton: TritonServer) -> None:
    with Client(triton.grpc_url, model="text_to_video") as client, pytest.raises(InvalidArgumentError, match="IMAGE"):
        client.generate("a cat", image=picture(), **SHORT)


def test_manifest_and_the_image_make_the_video_again(client: Client) -> None:
    image = picture(seed=5)
    video = client.generate("a cat", image=image, seed=9, boundary=0.94, fit="crop", **SHORT)
    manifest = read_manifest(video.data)
    assert client.generate(**manifest.request(image=image).arguments()).data == video.data
    with pytest.raises(ManifestError, match="give it with --image"):
        manifest.request()
    with pytest.raises(ManifestError, match="not the image that the video started from"):
        manifest.request(image=picture(seed=6))


def test_command_line(server: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "start.png").write_bytes(picture(seed=8))
    command = [sys.executable, "-m", "turbo_client"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False
        )

    made = run(
        "generate", "a cat", "--image", "start.png", "-o", "a.mp4", "--json", "--num-steps", "2", "--num-frames", "9",
        "--url", server.grpc_url,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "warning: with 2 steps the low-noise expert never runs" in made.stderr.splitlines()[0]
    assert json.loads(made.stdout)["report"]["stages"]["denoiser"]["experts"] == [0, 0]
    again = run("replay", "a.mp4", "--image", "start.png", "-o", "b.mp4", "--url", server.grpc_url)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    refused = run("replay", "a.mp4", "-o", "c.mp4", "--url", server.grpc_url)
    assert refused.returncode == 2
    assert "give it with --image" in refused.stderr


def test_raw_frames_equal_the_pipelines(client: Client, pipeline: Pipeline) -> None:
    values = {"seed": 3, **SHORT}
    raw = client.generate("a", image=picture(), container="raw", **values)
    direct = pipeline.generate("a", image=picture(), delivery=Delivery(container="raw", preview=False), **values)
    np.testing.assert_array_equal(raw.frames(), direct.frames)


def test_a_job_survives_the_death_of_the_denoiser_to_the_same_bytes(server: TritonServer, client: Client) -> None:
    request = {"prompt": "The cat turns", "image": picture(seed=12), "seed": 3, "num_frames": 33}
    expected = client.generate(**request)
    client.jobs.submit(**request, request_id="from-an-image")
    steps = []
    for progress in client.jobs.watch("from-an-image"):
        if progress.stage == "denoiser":
            steps.append(progress.step)
            if steps == [1, 2]:
                os.kill(find_processes(server.pid)["denoiser"], signal.SIGKILL)
    video = client.jobs.result("from-an-image")
    assert video.data == expected.data
    assert steps[-1] == 4
    assert client.jobs.status("from-an-image").resumes == 1
    assert video.report["stages"]["denoiser"]["resumed_after"] in (1, 2, 3)
    assert client.jobs.submit(**request, request_id="from-an-image").state == "done"
    with pytest.raises(AlreadyExistsError, match="other parameters"):
        client.jobs.submit(**{**request, "image": picture(seed=13)}, request_id="from-an-image")
