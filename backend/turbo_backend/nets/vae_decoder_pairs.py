"""The decoder two frames at a time through the fused convolutions of turbo_kernels; same layers, same parameters.

From the first doubling of frames on, a video's frames come in pairs, and a pair runs through all remaining layers
before the next one begins: a convolution needs the pair before it and nothing else, so that no frames are copied
together and only a pair is in memory beside the pasts. Each convolution computes the norm and SiLU of the layer
behind it. How many latent frames a chunk holds changes nothing from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, cat, nn

from turbo_backend.nets.vae_decoder import Decoder, Upsample
from turbo_backend.nets.vae_layers import CausalConv3d, FrameHistory, Head, ResidualBlock, RMSNorm, convolve
from turbo_kernels import (
    PairWeights,
    UpsampleWeights,
    causal_conv3d_pair,
    pair_weights,
    upsample_conv,
    upsample_weights,
)

#: The kernels read channels in multiples of this.
_CHANNEL_STEP = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Conv:
    """A causal convolution with the scale of the norm in front of it."""

    layer: CausalConv3d
    weights: PairWeights
    gamma_C: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    first: _Conv
    second: _Conv
    shortcut: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Doubling:
    time_conv: CausalConv3d | None
    weights: UpsampleWeights


def fits_pairs(decoder: Decoder) -> bool:
    """Whether the first doubling of size doubles the frames too, and the kernels take the channels behind it."""
    layers = _high_layers(decoder)
    doubling = layers[0] if layers else None
    if not isinstance(doubling, Upsample) or doubling.time_conv is None:
        return False
    convolutions = (module for layer in layers for module in layer.modules() if hasattr(module, "padding"))
    return all(size % _CHANNEL_STEP == 0 for conv in convolutions for size in conv.weight.shape[:2])


class PairDecoder:
    """Runs a `Decoder` whose history holds a video's first frame.

    Args:
        decoder: its parameters are read now, transformed, and kept beside it.
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
                self._layers.append(_Doubling(layer.time_conv, upsample_weights(conv.weight, conv.bias)))
            else:
                self._layers.append(_prepare_block(layer))
        self._head = _prepare_head(decoder.head)

    def is_current(self) -> bool:
        """Whether the decoder's parameters are those that were read."""
        return self._state == _parameter_state(self._decoder)

    def __call__(self, z_THWC: Tensor, history: FrameHistory) -> Tensor:
        """As `Decoder.forward` for frames after a video's first: [T, h, w, z_dim] to [4T, 8h, 8w, 3]."""
        x_THWC: Tensor = self._decoder.conv1(z_THWC, history)
        x_THWC = self._decoder.middle(x_THWC, history)
        for layer in _low_layers(self._decoder):
            x_THWC = layer(x_THWC, history)
        # In one go at the lowest resolution, where a single latent frame is no pair.
        doubling = self._layers[0]
        assert isinstance(doubling, _Doubling)
        assert doubling.time_conv is not None
        doubled_THWC = doubling.time_conv(x_THWC, history)
        frames: list[Tensor] = []
        for pair in _split_frames(doubled_THWC):
            self._enlarge(0, pair, history, frames)
        return cat(frames)

    def _enlarge(self, i_layer: int, x_2HWC: Tensor, history: FrameHistory, frames: list[Tensor]) -> None:
        """Layer `i_layer`, a doubling of size, and all layers behind it; the results are appended to `frames`."""
        doubling = self._layers[i_layer]
        assert isinstance(doubling, _Doubling)
        gamma = self._gamma_behind(i_layer)
        x, y = upsample_conv(x_2HWC, doubling.weights, gamma_C=gamma, provider=self._provider)
        for i, layer in enumerate(self._layers[i_layer + 1 :], start=i_layer + 1):
            if isinstance(layer, _Doubling):
                for pair in self._double_frames(layer, x, history):
                    self._enlarge(i, pair, history, frames)
                return
            assert y is not None
            gamma = self._gamma_behind(i)
            x, y = self._block(layer, x, y, gamma, history)
        assert y is not None
        frame, _ = self._conv(self._head, y, history)
        assert frame is not None
        frames.append(frame)

    def _double_frames(self, doubling: _Doubling, x_2HWC: Tensor, history: FrameHistory) -> list[Tensor]:
        layer = doubling.time_conv
        if layer is None:
            return [x_2HWC]
        window = cat([history.swap(layer, x_2HWC), x_2HWC])
        return _split_frames(convolve(window, layer.weight, layer.bias, padding=layer.padding))

    def _block(
        self, block: _Block, x: Tensor, y: Tensor, gamma: Tensor | None, history: FrameHistory
    ) -> tuple[Tensor, Tensor | None]:
        """x and silu(norm(x)) to the block's output and silu(norm(output)) with the scale `gamma` of what follows."""
        _, inner = self._conv(block.first, y, history, gamma=block.second.gamma_C, keep_output=False)
        assert inner is not None
        residual = x if block.shortcut is None else F.linear(x, *block.shortcut)
        out, normed = self._conv(block.second, inner, history, residual=residual, gamma=gamma)
        assert out is not None
        return out, normed

    def _conv(
        self,
        conv: _Conv,
        y: Tensor,
        history: FrameHistory,
        *,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        keep_output: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        past = history.swap(conv.layer, y)
        return causal_conv3d_pair(
            past,
            y,
            conv.weights,
            residual_2HWC=residual,
            gamma_C=gamma,
            keep_output=keep_output,
            provider=self._provider,
        )

    def _gamma_behind(self, i_layer: int) -> Tensor | None:
        """Scale of the norm that reads what layer `i_layer` made."""
        if i_layer + 1 == len(self._layers):
            return self._head.gamma_C
        following = self._layers[i_layer + 1]
        return following.first.gamma_C if isinstance(following, _Block) else None


def _low_layers(decoder: Decoder) -> list[nn.Module]:
    """The layers in front of the first doubling."""
    return list(decoder.upsamples)[: _first_doubling(decoder)]


def _high_layers(decoder: Decoder) -> list[nn.Module]:
    return list(decoder.upsamples)[_first_doubling(decoder) :]


def _first_doubling(decoder: Decoder) -> int:
    doublings = (i for i, layer in enumerate(decoder.upsamples) if isinstance(layer, Upsample))
    return next(doublings, len(decoder.upsamples))


def _split_frames(doubled_THWC: Tensor) -> list[Tensor]:
    """[T, H, W, 2C] to T pairs [2, H, W, C], without a copy: the first C channels are the earlier frame."""
    num_frames, height, width, channels = doubled_THWC.shape
    pairs = doubled_THWC.view(num_frames, height, width, 2, channels // 2).permute(0, 3, 1, 2, 4)
    return list(pairs.unbind(0))


def _prepare_block(layer: nn.Module) -> _Block:
    assert isinstance(layer, ResidualBlock)
    residual = layer.residual
    shortcut = None
    if layer.shortcut is not None:
        weight = layer.shortcut.weight
        shortcut = (weight.detach().flatten(1), layer.shortcut.bias.detach())
    return _Block(_prepare_conv(residual["2"], residual["0"]), _prepare_conv(residual["6"], residual["3"]), shortcut)


def _prepare_head(head: Head) -> _Conv:
    return _prepare_conv(head["2"], head["0"])


def _prepare_conv(layer: nn.Module, norm: nn.Module) -> _Conv:
    assert isinstance(layer, CausalConv3d)
    assert isinstance(norm, RMSNorm)
    return _Conv(layer, pair_weights(layer.weight, layer.bias), norm.gamma.detach().float().flatten())


def _parameter_state(decoder: Decoder) -> list[tuple[int, int]]:
    """Changes when a parameter is replaced or, outside inference mode, written to."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in decoder.parameters()]
