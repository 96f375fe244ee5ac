"""Encoding an image as a video of one changing frame: the bits of encoding every frame, with a part of the work."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from turbo_backend.config import VAEConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.vae import WanVAE

CONFIG = VAEConfig(base_dim=16)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    net = WanVAE(CONFIG)
    initialize_random(net, 0)
    return net.eval().requires_grad_(False)


def draw_image(height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def as_video(image: Tensor, num_frames: int) -> Tensor:
    video = torch.zeros(1, 3, num_frames, *image.shape[1:])
    video[0, :, 0] = image
    return video


# 25 frames: the wide layers have just come to rest; 161: all layers have.
@pytest.mark.parametrize("num_frames", [1, 5, 21, 25, 29, 81, 161])
def test_the_bits_are_those_of_encoding_every_frame(vae: WanVAE, num_frames: int) -> None:
    image = draw_image()
    assert torch.equal(vae.encode_image(image, num_frames=num_frames), vae.encode(as_video(image, num_frames))[0])


def test_layers_at_rest_do_not_run(vae: WanVAE) -> None:
    runs: Counter[str] = Counter()
    layers = {"conv1": vae.encoder.conv1, "first block": vae.encoder.downsamples[0], "head": vae.encoder.head}
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: runs.update([name]))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    vae.encode_image(draw_image(), num_frames=81)
    for hook in hooks:
        hook.remove()
    # The image, then two frames at a time: those that still see it, and two more that repeat; a block sees four more.
    assert runs == {"conv1": 3, "first block": 5, "head": 21}


def test_refusals(vae: WanVAE) -> None:
    for image, num_frames in ((draw_image()[None], 5), (draw_image(15), 5), (draw_image(), 6), (draw_image()[:2], 5)):
        with pytest.raises(InvalidArgument, match=r"image, num_frames = .*4k \+ 1"):
            vae.encode_image(image, num_frames=num_frames)
