"""The Wan VAE: published parameters, diffusers as oracle, streaming, independence of samples, refusals."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from turbo_backend.config import MODELS, VAEConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.vae import WanVAE

CONFIG = VAEConfig(base_dim=8)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    net = WanVAE(CONFIG)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 16, 4, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def video() -> Tensor:
    return torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1


def diffusers_name(name: str) -> str:
    """The name of a published parameter in diffusers' AutoencoderKLWan."""
    name = re.sub(r"^conv1\.", "quant_conv.", name)
    name = re.sub(r"^conv2\.", "post_quant_conv.", name)
    name = re.sub(r"^(encoder|decoder)\.conv1\.", r"\1.conv_in.", name)
    name = name.replace(".head.0.", ".norm_out.").replace(".head.2.", ".conv_out.")
    name = name.replace(".middle.0.", ".mid_block.resnets.0.").replace(".middle.2.", ".mid_block.resnets.1.")
    name = name.replace(".middle.1.", ".mid_block.attentions.0.")
    for place, layer in (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")):
        name = name.replace(f".residual.{place}.", f".{layer}.")
    name = name.replace(".shortcut.", ".conv_shortcut.").replace("encoder.downsamples.", "encoder.down_blocks.")

    def up_block(match: re.Match[str]) -> str:
        block, place = divmod(int(match[1]), 4)
        return f"decoder.up_blocks.{block}." + ("upsamplers.0." if place == 3 else f"resnets.{place}.")

    return re.sub(r"decoder\.upsamples\.(\d+)\.", up_block, name)


@pytest.fixture(scope="module")
def oracle(vae: WanVAE) -> AutoencoderKLWan:
    net = AutoencoderKLWan(base_dim=CONFIG.base_dim, z_dim=16)
    net.load_state_dict({diffusers_name(name): value for name, value in vae.state_dict().items()}, strict=True)
    return net.eval()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def test_published_parameters() -> None:
    with torch.device("meta"):
        net = WanVAE(MODELS["Wan2.1-1.3B"].vae)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(shapes) == 194
    assert sum(parameter.numel() for parameter in net.parameters()) == 126_892_531
    published = {
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.downsamples.8.time_conv.bias": (384,),
        "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1),
        "decoder.middle.1.norm.gamma": (384, 1, 1),
        "decoder.middle.1.proj.weight": (384, 384, 1, 1),
        "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.3.gamma": (96, 1, 1, 1),
        "decoder.head.0.gamma": (96, 1, 1, 1),
        "decoder.head.2.weight": (3, 96, 3, 3, 3),
    }
    assert {name: shapes[name] for name in published} == published
    assert "decoder.upsamples.11.time_conv.weight" not in shapes
    assert "encoder.downsamples.2.time_conv.weight" not in shapes


@pytest.mark.oracle
@pytest.mark.parametrize("num_latents", [1, 4])
def test_decode_against_diffusers(vae: WanVAE, oracle: AutoencoderKLWan, latents: Tensor, num_latents: int) -> None:
    latents = latents[:, :, :num_latents]
    mean = torch.tensor(CONFIG.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(CONFIG.latents_std).view(1, 16, 1, 1, 1)
    with torch.no_grad():
        expected = oracle.decode(latents * std + mean, return_dict=False)[0]
    # diffusers clamps to [-1, 1]; most values must be inside for the comparison to mean anything.
    actual = vae.decode(latents)
    assert float((actual.abs() < 1).float().mean()) > 0.9
    assert actual.shape == (2, 3, 4 * num_latents - 3, 32, 48)
    assert relative_difference(actual.clamp(-1, 1), expected) < 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("num_frames", [1, 9])
def test_encode_against_diffusers(vae: WanVAE, oracle: AutoencoderKLWan, video: Tensor, num_frames: int) -> None:
    video = video[:, :, :num_frames]
    mean = torch.tensor(CONFIG.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(CONFIG.latents_std).view(1, 16, 1, 1, 1)
    with torch.no_grad():
        expected = (oracle.encode(video).latent_dist.mode() - mean) / std
    actual = vae.encode(video)
    assert actual.dtype == torch.float32
    assert relative_difference(actual, expected) < 1e-5


def test_streaming_is_the_whole_decode(vae: WanVAE, latents: Tensor) -> None:
    chunks = list(vae.decode_chunks(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latents))


@pytest.mark.parametrize("chunk_latents", [2, 8])
def test_larger_chunks_agree(vae: WanVAE, latents: Tensor, chunk_latents: int) -> None:
    chunks = list(vae.decode_chunks(latents, chunk_latents=chunk_latents))
    sizes = {2: [1, 8, 4], 8: [1, 12]}
    assert [chunk.shape[2] for chunk in chunks] == sizes[chunk_latents]
    whole = torch.cat(chunks, dim=2)
    assert torch.equal(whole, vae.decode(latents, chunk_latents=chunk_latents))
    assert relative_difference(whole, vae.decode(latents)) < 1e-5


def test_a_prefix_decodes_to_the_same_frames(vae: WanVAE, latents: Tensor) -> None:
    whole = vae.decode(latents)
    for num_latents in (1, 3):
        num_frames = 4 * num_latents - 3
        assert torch.equal(vae.decode(latents[:, :, :num_latents]), whole[:, :, :num_frames])


def test_interleaved_decodes_do_not_meet(vae: WanVAE, latents: Tensor) -> None:
    first, second = latents.split(1)
    pairs = list(zip(vae.decode_chunks(first), vae.decode_chunks(second), strict=True))
    together = torch.cat([torch.cat(pair) for pair in pairs], dim=2)
    assert torch.equal(together, vae.decode(latents))


# 33 x 5 and 3 x 7 latent pixels leave vector tails in every elementwise loop.
@pytest.mark.parametrize("size", [(4, 6), (3, 7), (1, 1), (33, 5)])
def test_samples_do_not_depend_on_their_batch(vae: WanVAE, size: tuple[int, int]) -> None:
    latents = torch.randn(2, 16, 2, *size, generator=torch.Generator().manual_seed(3))
    batched = vae.decode(latents)
    for i_sample in range(2):
        assert torch.equal(vae.decode(latents[i_sample : i_sample + 1])[0], batched[i_sample])
    encoded = vae.encode(batched)
    for i_sample in range(2):
        assert torch.equal(vae.encode(batched[i_sample : i_sample + 1])[0], encoded[i_sample])


def test_a_neighbour_of_nan_is_unharmed(vae: WanVAE, latents: Tensor) -> None:
    spoilt = latents[:, :, :2].clone()
    spoilt[0] = float("nan")
    frames = vae.decode(spoilt)
    assert bool(frames[0].isnan().any())
    assert torch.equal(frames[1], vae.decode(latents[1:, :, :2])[0])


def test_decode_frame_is_the_first_frame(vae: WanVAE, latents: Tensor) -> None:
    frame = vae.decode_frame(latents[:, :, 3:4])
    assert frame.shape == (2, 3, 1, 32, 48)
    assert torch.equal(frame, vae.decode(latents[:, :, 3:])[:, :, :1])


def test_strided_input_changes_nothing(vae: WanVAE, latents: Tensor) -> None:
    strided = latents.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(vae.decode(strided), vae.decode(latents))


@pytest.mark.oracle
def test_bfloat16_is_as_exact_as_pytorch(vae: WanVAE, oracle: AutoencoderKLWan, latents: Tensor) -> None:
    """RMSE against fp32 at most that of diffusers in bf16 and a quarter."""
    latents = latents[:, :, :2]
    mean = torch.tensor(CONFIG.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(CONFIG.latents_std).view(1, 16, 1, 1, 1)
    net = WanVAE(CONFIG).bfloat16()
    net.load_state_dict(vae.state_dict())
    frames = net.decode(latents)
    assert frames.dtype == torch.bfloat16
    with torch.no_grad():
        plain = deepcopy(oracle).bfloat16().decode((latents * std + mean).bfloat16(), return_dict=False)[0]
    exact = vae.decode(latents).clamp(-1, 1)
    error, plain_error = ((x.float().clamp(-1, 1) - exact).square().mean().sqrt() for x in (frames, plain))
    assert error <= 1.25 * plain_error
    assert net.encode(frames).dtype == torch.float32


def test_refusals(vae: WanVAE, latents: Tensor, video: Tensor) -> None:
    with pytest.raises(InvalidArgument, match=r"latents = \(2, 15, 4, 4, 6\): must be \[B, 16, T, h, w\]"):
        vae.decode(latents[:, 1:])
    with pytest.raises(InvalidArgument, match="latents"):
        vae.decode(latents[0])
    with pytest.raises(InvalidArgument, match="latents"):
        vae.decode(latents[:, :, :0])
    with pytest.raises(InvalidArgument, match="chunk_latents = 0"):
        list(vae.decode_chunks(latents, chunk_latents=0))
    with pytest.raises(InvalidArgument, match="one latent frame"):
        vae.decode_frame(latents)
    for bad in (video[:, :, :4], video[..., :-1], video[:, :2], video[0], video[:, :, :, :0], video[:0]):
        with pytest.raises(InvalidArgument, match=r"video = .*4k \+ 1"):
            vae.encode(bad)
