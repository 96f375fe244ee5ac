"""One server with two networks: each has an ensemble and a denoiser of its own; text encoder and VAE serve both."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image

from turbo_backend.pipeline import Pipeline
from turbo_backend.server.process import TritonServer
from turbo_backend.settings import Settings
from turbo_client import Client

pytestmark = pytest.mark.server

PROMPT = "A red kite over the sea"
SMALL = {"num_frames": 5, "num_steps": 1}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    environment = {"TURBO_DEVICE": "cpu", "TURBO_MODEL": "tiny,tiny-I2V"}
    with TritonServer(environment=environment, ready_timeout=120) as server, Client(server.grpc_url) as client:
        yield client


def test_text_goes_to_one_and_an_image_to_the_other(client: Client) -> None:
    file = BytesIO()
    Image.new("RGB", (64, 48), "teal").save(file, "PNG")
    image = file.getvalue()
    from_text = client.generate(PROMPT, seed=7, **SMALL)
    from_image = client.generate(PROMPT, seed=7, image=image, **SMALL)
    assert [video.report["model"] for video in (from_text, from_image)] == ["tiny", "tiny-I2V"]
    assert [video.report["ensemble"] for video in (from_text, from_image)] == ["text_to_video", "image_to_video"]
    for model, video, inputs in (("tiny", from_text, {}), ("tiny-I2V", from_image, {"image": image})):
        pipeline = Pipeline.from_settings(Settings.from_environment({"TURBO_MODEL": model, "TURBO_DEVICE": "cpu"}))
        assert pipeline.generate(PROMPT, seed=7, **inputs, **SMALL).mp4 == video.data
