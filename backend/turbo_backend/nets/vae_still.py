"""Encoding an image as the first frame of a video whose other frames are one constant: what repeats is computed once.

Every layer of the encoder is causal and sees a few past frames, so from some frame on its output is constant as well:
later than its input by the frames that it sees. Of 81 frames the wide layers at high resolution compute 5 to 21. The
same numbers as by encoding every frame: equal inputs give equal outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from turbo_backend.nets.vae_encoder import Downsample, Encoder
from turbo_backend.nets.vae_layers import CausalConv3d, FrameHistory


class _RestingLayer:
    """A layer that is no longer run once it can only repeat its last output.

    Inputs and outputs at rest are told by identity: the same tensor object over and over.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._num_past = _frames_seen(layer)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._repeats = 0

    def __call__(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        self._repeats = self._repeats + 1 if x_THWC is self._input else 0
        self._input = x_THWC
        # The last output saw nothing but this input: itself, and as many past frames as the layer sees.
        if self._output is None or (self._repeats - 1) * len(x_THWC) < self._num_past:
            self._output = self._layer(x_THWC, history)
        return self._output


class StillEncoder:
    """Runs an `Encoder` over an image and the constant frames behind it, one sample, once.

    Args:
        encoder: whose layers run; it halves the frames twice.
        image_1HWC: the first frame.
        rest_THWC: 2 frames, those that follow again and again.
    """

    def __init__(self, encoder: Encoder, image_1HWC: Tensor, rest_THWC: Tensor) -> None:
        layers = [encoder.conv1, *encoder.downsamples, encoder.middle, encoder.head]
        # Up to a halving of frames two at a time; behind the second halving one is a latent frame.
        self._full, self._half, self._quarter = _split_by_rate([_RestingLayer(layer) for layer in layers], layers)
        self._image, self._rest = image_1HWC, rest_THWC
        self._history = FrameHistory()

    def __call__(self, num_latents: int) -> Iterator[Tensor]:
        """The encoder's output for each of `num_latents` latent frames, [1, H/8, W/8, 2 z_dim] each."""
        pair: tuple[Tensor, Tensor, Tensor] | None = None
        yield self._run(self._quarter, self._run(self._half, self._run(self._full, self._image)))
        for latent in range(1, num_latents):
            first = self._run(self._full, self._rest)
            if latent == num_latents - 1:
                self._history.finish()
            second = self._run(self._full, self._rest)
            if pair is None or first is not pair[0] or second is not pair[1]:
                pair = first, second, torch.cat((first, second))
            yield self._run(self._quarter, self._run(self._half, pair[2]))

    def _run(self, layers: Sequence[_RestingLayer], x_THWC: Tensor) -> Tensor:
        for layer in layers:
            x_THWC = layer(x_THWC, self._history)
        return x_THWC


def _split_by_rate(resting: Sequence[_RestingLayer], layers: Sequence[nn.Module]) -> list[list[_RestingLayer]]:
    sections: list[list[_RestingLayer]] = [[]]
    for one, layer in zip(resting, layers, strict=True):
        sections[-1].append(one)
        if isinstance(layer, Downsample) and layer.time_conv is not None:
            sections.append([])
    return sections


def _frames_seen(layer: nn.Module) -> int:
    """Past frames that an output frame depends on."""
    if isinstance(layer, Downsample):
        return 0 if layer.time_conv is None else 1
    return sum(module.depth for module in layer.modules() if isinstance(module, CausalConv3d))
