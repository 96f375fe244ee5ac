"""The image encoder stage: conditioning, cache, report, refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch

from turbo_backend.config import MODELS, ModelConfig
from turbo_backend.errors import InvalidArgument, TurboError
from turbo_backend.image import decode_image, resize_image
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.vae import WanVAE
from turbo_backend.stages.image_encoder import EncodedImage, ImageEncoderStage, ImageRequest

Picture = Callable[..., bytes]
FRAMES = {"NUM_FRAMES": 5}


@pytest.fixture(scope="module")
def vae(image_model: ModelConfig) -> WanVAE:
    net = WanVAE(image_model.vae)
    initialize_random(net, 0, device=torch.device("cpu"), dtype=torch.float32)
    return net.eval()


@pytest.fixture
def stage(vae: WanVAE, image_model: ModelConfig) -> ImageEncoderStage:
    return ImageEncoderStage(vae, image_model, cache_entries=2, fingerprint="sha256:vae")


def encode(stage: ImageEncoderStage, content: bytes, **values: object) -> EncodedImage:
    (outcome,) = stage.encode([ImageRequest(content=content, values={**FRAMES, **values})])
    assert isinstance(outcome, EncodedImage), outcome
    return outcome


def test_conditioning_is_mask_then_latents(stage: ImageEncoderStage, vae: WanVAE, picture: Picture) -> None:
    content = picture(100, 60)
    encoded = encode(stage, content)
    assert encoded.latents.shape == (20, 2, 18, 32)
    assert encoded.latents.dtype == torch.float32
    assert (encoded.latents[:4, 0] == 1).all()
    assert (encoded.latents[:4, 1:] == 0).all()
    pixels = resize_image(decode_image(content), width=256, height=144, fit="stretch").float()
    video = torch.cat([(pixels / 255 * 2 - 1)[None, :, None], torch.zeros(1, 3, 4, 144, 256)], dim=2)
    torch.testing.assert_close(encoded.latents[4:], vae.encode(video)[0], rtol=0, atol=1e-4)


def test_report(stage: ImageEncoderStage, picture: Picture) -> None:
    content = picture(100, 60)
    report = encode(stage, content, FIT="crop").report()
    assert report["image"] == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "format": "PNG",
        "width": 100,
        "height": 60,
        "fit": "crop",
        "scaled_to": [256, 144],
        "crop": [0, 2, 100, 56],
    }
    assert report["weights"] == {"vae": "sha256:vae"}
    assert report["notes"] == []


def test_distortion_is_said(stage: ImageEncoderStage, picture: Picture) -> None:
    (note,) = encode(stage, picture(60, 60)).notes
    assert "60x60 image to 256x144" in note
    assert encode(stage, picture(60, 60), FIT="crop").notes == ()
    assert encode(stage, picture(60, 60), ADAPTIVE_RESOLUTION=True).notes == ()
    assert encode(stage, picture(320, 180)).notes == ()


def test_adaptive_resolution_follows_the_image(stage: ImageEncoderStage, picture: Picture) -> None:
    encoded = encode(stage, picture(60, 120), ADAPTIVE_RESOLUTION=True)
    assert encoded.facts["scaled_to"] == [128, 272]
    assert encoded.latents.shape == (20, 2, 34, 16)


def test_cache_knows_content_size_frames_and_fit(stage: ImageEncoderStage, picture: Picture) -> None:
    first = encode(stage, picture(64, 64))
    again = encode(stage, picture(64, 64))
    assert (first.cache_hit, again.cache_hit) == (False, True)
    assert torch.equal(first.latents, again.latents)
    assert encode(stage, picture(64, 64), SEED=9, NUM_STEPS=1).cache_hit
    for values in ({"FIT": "crop"}, {"NUM_FRAMES": 1}, {"ASPECT_RATIO": "1:1"}):
        assert not encode(stage, picture(64, 64), **values).cache_hit
    assert not encode(stage, picture(64, 64, seed=1)).cache_hit
    assert not encode(stage, picture(64, 64)).cache_hit, "two entries are kept, and two others came since"


def test_without_cache(vae: WanVAE, image_model: ModelConfig, picture: Picture) -> None:
    stage = ImageEncoderStage(vae, image_model, cache_entries=0, fingerprint="")
    for _ in range(2):
        assert not encode(stage, picture(64, 64), NUM_FRAMES=1).cache_hit


def test_bad_requests_harm_no_neighbour(stage: ImageEncoderStage, picture: Picture) -> None:
    good = ImageRequest(content=picture(64, 64), values=FRAMES)
    bad = [
        (ImageRequest(content=b"junk", values=FRAMES), "IMAGE"),
        (ImageRequest(content=picture(64, 64)[:-50], values=FRAMES), "IMAGE"),
        (ImageRequest(content=good.content, values={"BOUNDARY": 0.4}), "BOUNDARY"),
        (ImageRequest(content=good.content, values={"FIT": "pad"}), "FIT"),
        (ImageRequest(content=good.content, values={"SLA_TOPK": 2.0}), "SLA_TOPK"),
        (ImageRequest(content=picture(4000, 16), values={"ADAPTIVE_RESOLUTION": True}), "IMAGE"),
    ]
    outcomes = stage.encode([good, *[request for request, _ in bad], good])
    assert isinstance(outcomes[0], EncodedImage)
    assert isinstance(outcomes[-1], EncodedImage)
    for outcome, (_, field) in zip(outcomes[1:-1], bad, strict=True):
        assert isinstance(outcome, InvalidArgument)
        assert outcome.field == field
    assert outcomes[-1].cache_hit, "nothing bad took the place of what was encoded first"


def test_text_model_refuses_every_image(picture: Picture) -> None:
    stage = ImageEncoderStage(None, MODELS["tiny"], cache_entries=1, fingerprint="")
    (outcome,) = stage.encode([ImageRequest(content=picture(64, 64), values={})])
    assert isinstance(outcome, TurboError)
    assert "this server runs tiny, which makes videos from text alone" in str(outcome)
