"""The differentiable forwards of training agree with the networks that are served."""

from __future__ import annotations

import io
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from turbo_backend.config import MODELS, DiTConfig, TextEncoderConfig, VAEConfig
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.nets.vae import WanVAE
from turbo_backend.stages.image_encoder import EncodedImage, ImageEncoderStage, ImageRequest
from turbo_training.attention_forward import TrainingAttention
from turbo_training.dit_forward import Condition, TextBatch, velocity
from turbo_training.latents import encode_first_frames, with_mask
from turbo_training.text_forward import encode_text, pad_tokens
from turbo_training.train_teacher import take_image
from turbo_training.vae_forward import (
    decode_latents,
    encode_moments,
    fold_statistics,
    latent_statistics,
    normalize_latents,
)

pytestmark = pytest.mark.oracle


def largest_difference(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out - reference).abs().max() / reference.abs().max())


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    net = WanDiT(DiTConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=32, text_len=24))
    initialize_random(net, 3)
    return net


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, TextBatch]:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 16, 3, 18, 16, generator=generator)  # 216 tokens: 2 query blocks, 4 key blocks, ragged
    text = TextBatch(torch.randn(2, 9, 32, generator=generator), torch.tensor([9, 4]))
    return latents, torch.tensor([988.0, 608.0]), text


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("topk", [None, 0.3, 0.6])
def test_dit(
    dit: WanDiT, inputs: tuple[torch.Tensor, torch.Tensor, TextBatch], topk: float | None, explicit: bool
) -> None:
    latents, timesteps, text = inputs
    settings = AttentionSettings(
        attention_type="original" if topk is None else "sla", sla_topk=topk or 0.1, provider="reference"
    )
    context = dit.prepare_context(text.embeddings, text.lengths.tolist())
    served = dit(latents, timesteps, context, attention=settings)
    trained = velocity(
        dit, latents, timesteps, Condition(text), attention=TrainingAttention(topk=topk, explicit=explicit)
    )
    assert largest_difference(trained, served) < 1e-4


@pytest.mark.parametrize("topk", [None, 0.3])
def test_streams_are_those_after_each_block(
    dit: WanDiT, inputs: tuple[torch.Tensor, torch.Tensor, TextBatch], topk: float | None
) -> None:
    latents, timesteps, text = inputs
    attention = TrainingAttention(topk=topk)
    shorter = deepcopy(dit)
    shorter.blocks = shorter.blocks[:1]
    streams: dict[WanDiT, list[torch.Tensor]] = {dit: [], shorter: []}
    for net, found in streams.items():
        out = velocity(net, latents, timesteps, Condition(text), attention=attention, streams=found)
        assert torch.equal(out, velocity(net, latents, timesteps, Condition(text), attention=attention))
    assert [len(found) for found in streams.values()] == [2, 1]
    assert torch.equal(streams[dit][0], streams[shorter][0])
    assert not torch.equal(streams[dit][1], streams[dit][0])


# PyTorch's own rules for forward derivatives are loaded through what it calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_dit_has_forward_derivatives_through_sparse_attention(
    dit: WanDiT, inputs: tuple[torch.Tensor, torch.Tensor, TextBatch]
) -> None:
    latents, timesteps, text = inputs
    attention = TrainingAttention(topk=0.6, explicit=True)
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))

    def along(step: torch.Tensor) -> torch.Tensor:
        return velocity(dit, latents + step * direction, timesteps + step, Condition(text), attention=attention)

    _, tangent = torch.func.jvp(along, (torch.zeros(()),), (torch.ones(()),))
    step = torch.tensor(5e-3)
    # A difference quotient in float32 is good to about 1e-3.
    quotient = (along(step) - along(-step)) / (2 * step)
    assert largest_difference(tangent, quotient) < 2e-2


def test_a_network_that_takes_an_image_begins_as_the_one_that_takes_none(
    dit: WanDiT, inputs: tuple[torch.Tensor, torch.Tensor, TextBatch]
) -> None:
    latents, timesteps, text = inputs
    wider = take_image(dit, replace(dit.config, in_channels=36))
    image = torch.randn(2, 20, *latents.shape[2:], generator=torch.Generator().manual_seed(9))
    with_image = velocity(wider, latents, timesteps, Condition(text, image))
    torch.testing.assert_close(with_image, velocity(dit, latents, timesteps, Condition(text)), atol=1e-5, rtol=1e-5)


def test_images_condition_training_as_they_condition_serving(vae: WanVAE, image_png: bytes) -> None:
    model = replace(MODELS["tiny-I2V"], vae=vae.config, default_num_frames=5)
    stage = ImageEncoderStage(vae, model, cache_entries=0, fingerprint="")
    (served,) = stage.encode([ImageRequest(content=image_png, values={"NUM_FRAMES": 5})])
    assert isinstance(served, EncodedImage)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(image_png))))
    clip = pixels.expand(1, 5, *pixels.shape).clone()
    trained = with_mask(encode_first_frames(vae, clip).float())[0]
    assert largest_difference(trained, served.latents) < 2**-8  # kept in bfloat16


@pytest.fixture
def image_png() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (144, 256, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_text_encoder() -> None:
    config = TextEncoderConfig(vocab_size=64, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=2)
    encoder = UMT5Encoder(config)
    initialize_random(encoder, 4)
    token_ids, lengths = pad_tokens([[5, 9, 33, 1], [*range(2, 40), 1]], torch.device("cpu"))
    served = encoder(token_ids, lengths.tolist())
    with torch.no_grad():
        trained = encode_text(encoder, token_ids, lengths).embeddings
    assert largest_difference(trained, served) < 1e-4


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    net = WanVAE(VAEConfig(base_dim=8))
    initialize_random(net, 6)
    return net


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_vae(vae: WanVAE, num_frames: int) -> None:
    generator = torch.Generator().manual_seed(2)
    video = torch.rand(2, 3, num_frames, 32, 48, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = normalize_latents(vae, encode_moments(vae, video)[0])
        shift, scale = latent_statistics(vae, latents.device)
        frames = decode_latents(vae, latents * scale + shift)
    assert largest_difference(latents, vae.encode(video)) < 1e-4
    assert largest_difference(frames, vae.decode(latents)) < 1e-4


def test_folded_statistics_hold_and_change_no_pixel() -> None:
    vae = WanVAE(VAEConfig(base_dim=8))
    initialize_random(vae, 7)
    video = torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        before, _ = encode_moments(vae, video)
        frames = decode_latents(vae, before)
        fold_statistics(vae, before.mean((0, 2, 3, 4)), before.std((0, 2, 3, 4)))
        after, _ = encode_moments(vae, video)
        assert largest_difference(decode_latents(vae, after), frames) < 1e-4
        latents = normalize_latents(vae, after)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3, rtol=0)


def test_the_tiny_model_has_the_published_latent_statistics() -> None:
    assert MODELS["tiny"].vae.latents_std == VAEConfig().latents_std
