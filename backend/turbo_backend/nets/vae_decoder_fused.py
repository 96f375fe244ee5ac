"""The decoder through the fused convolutions of turbo_kernels: same layers, same parameters, other order.

From the first doubling of frames on, the frames of one latent frame run through all remaining layers before the next
ones begin, whatever the size of the chunk: a convolution needs the two frames before them and nothing else. It reads
its frames from a ring that holds those two and the new ones, so that none is ever moved, and writes the norm and SiLU
of its result straight into the ring of the convolution behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, cat, nn, stack

from turbo_backend.nets.vae_decoder import Decoder, Upsample
from turbo_backend.nets.vae_layers import (
    RING_PAST,
    CausalConv3d,
    FrameConv,
    FrameHistory,
    FrameRing,
    ResidualBlock,
    RMSNorm,
    convolve,
)
from turbo_kernels.conv3d import ConvWeights, causal_conv3d, conv_weights
from turbo_kernels.upsample_conv import UpsampleWeights, upsample_conv, upsample_weights

#: The kernels read channels in multiples of this.
_CHANNEL_STEP = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Conv:
    """A causal convolution and the scale of the norm in front of it."""

    layer: CausalConv3d
    weights: ConvWeights
    gamma: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    first: _Conv
    second: _Conv
    shortcut: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Doubling:
    time_conv: CausalConv3d | None
    weights: UpsampleWeights


def fits_kernels(decoder: Decoder) -> bool:
    """Whether the first doubling of size doubles the frames too, and the kernels take the channels behind it."""
    layers = _high_layers(decoder)
    doubling = layers[0] if layers else None
    if not isinstance(doubling, Upsample) or doubling.time_conv is None:
        return False
    weights = [parameter for layer in layers for parameter in layer.parameters() if parameter.dim() > 1]
    return all(weight.shape[0] % _CHANNEL_STEP == 0 for weight in weights)


class FusedDecoder:
    """Runs a `Decoder` whose history holds a video's first frame.

    Args:
        decoder: its parameters are read now, laid out for the kernels, and kept beside it.
        provider: of the kernels; the device's default by default.
    """

    def __init__(self, decoder: Decoder, *, provider: str | None = None) -> None:
        self._decoder = decoder
        self._provider = provider
        self._state = _parameter_state(decoder)
        self._layers: list[_Block | _Doubling] = []
        for layer in _high_layers(decoder):
            if isinstance(layer, Upsample):
                conv = layer.resample["1"]
                assert isinstance(conv, FrameConv)
                self._layers.append(_Doubling(layer.time_conv, upsample_weights(conv.weight, conv.bias)))
            else:
                self._layers.append(_prepare_block(layer))
        self._head = _prepare_conv(decoder.head["2"], decoder.head["0"])

    def is_current(self) -> bool:
        """Whether the decoder's parameters are those that were read."""
        return self._state == _parameter_state(self._decoder)

    def __call__(self, z_THWC: Tensor, history: FrameHistory) -> Tensor:
        """As `Decoder.forward` for frames after a video's first: [T, h, w, z_dim] to [4T, 8h, 8w, 3]."""
        x_THWC: Tensor = self._decoder.conv1(z_THWC, history)
        x_THWC = self._decoder.middle(x_THWC, history)
        for layer in _low_layers(self._decoder):
            x_THWC = layer(x_THWC, history)
        doubling = self._layers[0]
        assert isinstance(doubling, _Doubling)
        assert doubling.time_conv is not None
        doubled_THWC = doubling.time_conv(x_THWC, history)
        return cat([self._enlarge(_split_frames(frame), history) for frame in doubled_THWC.split(1)])

    def _enlarge(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        """The frames of one latent frame, doubled in time, from the first doubling of size to the head."""
        ring: FrameRing | None = None
        for i, layer in enumerate(self._layers):
            following = self._reader_behind(i)
            if isinstance(layer, _Block):
                assert ring is not None
                x_THWC, ring = self._block(layer, x_THWC, ring, following, history)
                continue
            if i > 0 and layer.time_conv is not None:
                x_THWC = _double_frames(layer.time_conv, x_THWC, history)
            num_frames, height, width, _ = x_THWC.shape
            shape = num_frames, 2 * height, 2 * width, len(layer.weights.bias)
            ring = None if following is None else history.advance_ring(following.layer, shape, x_THWC)
            x_THWC = upsample_conv(
                x_THWC,
                layer.weights,
                gamma_C=None if following is None else following.gamma,
                norm_out_RHWC=None if ring is None else ring.frames,
                norm_first=0 if ring is None else ring.begin,
                provider=self._provider,
            )
        assert ring is not None
        frames_THWC, _ = self._conv(self._head, ring, x_THWC.shape, None, history)
        assert frames_THWC is not None
        return frames_THWC

    def _block(
        self, block: _Block, x_THWC: Tensor, ring: FrameRing, following: _Conv | None, history: FrameHistory
    ) -> tuple[Tensor, FrameRing | None]:
        """A residual block of x, whose norm is in `ring`; its output, and the ring with the norm of that."""
        _, inner = self._conv(block.first, ring, x_THWC.shape, block.second, history, keep_output=False)
        assert inner is not None
        residual = x_THWC if block.shortcut is None else F.linear(x_THWC, *block.shortcut)
        out, ring_behind = self._conv(block.second, inner, x_THWC.shape, following, history, residual=residual)
        assert out is not None
        return out, ring_behind

    def _conv(
        self,
        conv: _Conv,
        ring: FrameRing,
        shape: Sequence[int],
        following: _Conv | None,
        history: FrameHistory,
        *,
        residual: Tensor | None = None,
        keep_output: bool = True,
    ) -> tuple[Tensor | None, FrameRing | None]:
        """The convolution of the newest frames of `ring`, and the ring of `following` with the norm of the result.

        Args:
            shape: T, H, W (and more) of the frames.
        """
        out_shape = (*shape[:3], conv.weights.out_channels)
        behind = None if following is None else history.advance_ring(following.layer, out_shape, ring.frames)
        out = causal_conv3d(
            ring.frames,
            conv.weights,
            first=ring.begin - RING_PAST,
            num_frames=shape[0],
            residual_THWC=residual,
            gamma_C=None if following is None else following.gamma,
            keep_output=keep_output,
            norm_out_RHWC=None if behind is None else behind.frames,
            norm_first=0 if behind is None else behind.begin,
            provider=self._provider,
        )
        return out, behind

    def _reader_behind(self, i_layer: int) -> _Conv | None:
        """The convolution that reads silu(norm(x)) of what layer `i_layer` makes, if one does."""
        if i_layer + 1 == len(self._layers):
            return self._head
        following = self._layers[i_layer + 1]
        return following.first if isinstance(following, _Block) else None


def _low_layers(decoder: Decoder) -> list[nn.Module]:
    """The layers in front of the first doubling."""
    return list(decoder.upsamples)[: _first_doubling(decoder)]


def _high_layers(decoder: Decoder) -> list[nn.Module]:
    return list(decoder.upsamples)[_first_doubling(decoder) :]


def _first_doubling(decoder: Decoder) -> int:
    doublings = (i for i, layer in enumerate(decoder.upsamples) if isinstance(layer, Upsample))
    return next(doublings, len(decoder.upsamples))


def _split_frames(doubled_THWC: Tensor) -> Tensor:
    """[T, H, W, 2C] to [2T, H, W, C]: the first C channels are the earlier frame. For T = 1 without a copy."""
    num_frames, height, width, channels = doubled_THWC.shape
    split = doubled_THWC.reshape(num_frames, height, width, 2, channels // 2).permute(0, 3, 1, 2, 4)
    return split.reshape(2 * num_frames, height, width, channels // 2)


def _double_frames(layer: CausalConv3d, x_THWC: Tensor, history: FrameHistory) -> Tensor:
    ring = history.advance_ring(layer, x_THWC.shape, x_THWC)
    size = len(ring.frames)
    window = [ring.frames[i % size] for i in range(ring.begin - RING_PAST, ring.begin)]
    for t, frame in enumerate(x_THWC):
        ring.frames[(ring.begin + t) % size] = frame
        window.append(frame)
    return _split_frames(convolve(stack(window), layer.weight, layer.bias, padding=layer.padding))


def _prepare_block(layer: nn.Module) -> _Block:
    assert isinstance(layer, ResidualBlock)
    residual = layer.residual
    shortcut = None
    if layer.shortcut is not None:
        weight = layer.shortcut.weight
        shortcut = (weight.detach().flatten(1), layer.shortcut.bias.detach())
    return _Block(_prepare_conv(residual["2"], residual["0"]), _prepare_conv(residual["6"], residual["3"]), shortcut)


def _prepare_conv(layer: nn.Module, norm: nn.Module) -> _Conv:
    assert isinstance(layer, CausalConv3d)
    assert isinstance(norm, RMSNorm)
    return _Conv(layer, conv_weights(layer.weight, layer.bias), norm.gamma.detach().float().flatten())


def _parameter_state(decoder: Decoder) -> list[tuple[int, int]]:
    """Changes when a parameter is replaced or, outside inference mode, written to."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in decoder.parameters()]
