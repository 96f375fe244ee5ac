"""The decoder in its fused form against the plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turbo_backend.config import VAEConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets import vae_decoder_fused
from turbo_backend.nets.vae import WanVAE
from turbo_backend.nets.vae_decoder_fused import FusedDecoder, fits_kernels
from turbo_kernels.upsample_conv import upsample_conv


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    net = WanVAE(VAEConfig(base_dim=16))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 16, 5, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fused(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> WanVAE:
    """The same network with the fused form, by the kernels' references, where a GPU would take the kernels."""
    decoder = FusedDecoder(vae.decoder)
    monkeypatch.setattr(
        vae, "_decoder_for", lambda z, history: decoder if history.has_started(vae.decoder.conv1) else vae.decoder
    )
    return vae


@pytest.mark.oracle
def test_fused_is_plain(vae: WanVAE, latents: Tensor, request: pytest.FixtureRequest) -> None:
    expected = vae.decode(latents)
    fused = request.getfixturevalue("fused")
    for chunk_latents in (1, 3):
        frames = fused.decode(latents, chunk_latents=chunk_latents)
        assert frames.shape == expected.shape
        assert float((frames - expected).abs().max() / expected.abs().max()) < 1e-5


def test_streams_do_not_meet(fused: WanVAE, latents: Tensor) -> None:
    whole = fused.decode(latents)
    first, second = latents.split(1)
    pairs = list(zip(fused.decode_chunks(first), fused.decode_chunks(second), strict=True))
    assert torch.equal(torch.cat([torch.cat(pair) for pair in pairs], dim=2), whole)
    assert torch.equal(fused.decode(latents[:, :, :3]), whole[:, :, :9])


def test_kernel_error(fused: WanVAE, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tells kernels that round from one that is wrong."""
    two = latents[:1, :, :2]
    assert 0 < fused.kernel_error(two) < 1e-5

    def without_bias(*arguments: object, **options: object) -> Tensor:
        frames, weights, *rest = arguments
        return upsample_conv(frames, replace(weights, bias=torch.zeros_like(weights.bias)), *rest, **options)

    monkeypatch.setattr(vae_decoder_fused, "upsample_conv", without_bias)
    assert fused.kernel_error(two) > 0.01
    with pytest.raises(InvalidArgument, match="two latent frames"):
        fused.kernel_error(latents)


def test_prepared_weights_follow_the_parameters(vae: WanVAE) -> None:
    decoder = FusedDecoder(vae.decoder)
    assert decoder.is_current()
    with torch.no_grad():
        vae.decoder.head["2"].bias.add_(0.0)
    assert not decoder.is_current()


def test_which_decoders_fit(vae: WanVAE) -> None:
    assert fits_kernels(vae.decoder)
    assert not fits_kernels(WanVAE(VAEConfig(base_dim=8)).decoder)
    assert not fits_kernels(WanVAE(VAEConfig(base_dim=16, temporal_downsample=(True, True, False))).decoder)


@pytest.mark.gpu
@pytest.mark.oracle
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_on_the_gpu(latents: Tensor) -> None:
    """bf16 by the kernels is no further from fp32 than bf16 by PyTorch alone, and a stream is the whole decode."""
    torch.manual_seed(0)
    exact_net = WanVAE(VAEConfig(base_dim=32)).cuda()
    net = WanVAE(VAEConfig(base_dim=32)).cuda().bfloat16()
    net.load_state_dict(exact_net.state_dict())
    exact = exact_net.cpu().decode(latents)
    plain = net.cpu().decode(latents).float()
    frames = net.cuda().decode(latents.cuda())
    error, plain_error = (float((x.cpu().float() - exact).square().mean()) for x in (frames, plain))
    assert error <= 1.5**2 * plain_error
    assert torch.equal(torch.cat(list(net.decode_chunks(latents.cuda())), dim=2), frames)
    assert 0 < net.kernel_error(latents[:1, :, :2]) < 0.1
