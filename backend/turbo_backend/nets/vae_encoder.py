"""Encoder of the Wan2.1 VAE: pixel frames to latent frames, one sample at a time (`x_THWC`, channels last)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from turbo_backend.config import VAEConfig
from turbo_backend.nets.vae_layers import (
    CausalConv3d,
    Convolution,
    FrameHistory,
    Head,
    MiddleBlocks,
    ResidualBlock,
    convolve,
)


class TimeDownsample(Convolution):
    """Halves the frames: a (3, 1, 1) convolution of time stride 2 over the last frame seen and the new ones.

    The first frame of a video passes unchanged and becomes the last frame seen.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1))

    def forward(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        if not history.has_started(self):
            history.keep(self, x_THWC)
            return x_THWC
        window_THWC = history.open_window(self, x_THWC, depth=1)
        window_THWC[1:] = x_THWC
        history.keep(self, window_THWC[-1:])
        return convolve(window_THWC, self.weight, self.bias, padding=self.padding, time_stride=2)


class SpaceDownsample(Convolution):
    """Halves height and width: a 3x3 convolution of stride 2, with a line of zeros to the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 3))

    def forward(self, x_THWC: Tensor) -> Tensor:
        padded_THWC = F.pad(x_THWC, (0, 0, 0, 1, 0, 1))
        return convolve(padded_THWC, self.weight, self.bias, padding=(0, 0), stride=2)


class Downsample(nn.Module):
    """Halves height and width, a temporal one then also the frames."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        # 0 is the padding, without parameters.
        self.resample = nn.ModuleDict({"1": SpaceDownsample(channels)})
        self.time_conv = TimeDownsample(channels) if temporal else None

    def forward(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        y_THWC: Tensor = self.resample["1"](x_THWC)
        return y_THWC if self.time_conv is None else self.time_conv(y_THWC, history)


class Encoder(nn.Module):
    """3 channels to 2 z_dim (mean, log-variance) at 1/8 size; 4T frames make T latent frames, the first one one."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, config.base_dim)
        layers: list[ResidualBlock | Downsample] = []
        channels = config.base_dim
        for mult, halves_frames in zip(config.dim_mult, (*config.temporal_downsample, None), strict=True):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(channels, config.base_dim * mult))
                channels = config.base_dim * mult
            if halves_frames is not None:
                layers.append(Downsample(channels, temporal=halves_frames))
        self.downsamples = nn.ModuleList(layers)
        self.middle = MiddleBlocks(channels)
        self.head = Head(channels, 2 * config.z_dim)

    def forward(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        """The next latent frames of one sample.

        Args:
            x_THWC: [1, H, W, 3] for a video's first frame, then [4T, H, W, 3]; pixels in [-1, 1].
            history: what the sample's earlier frames left; updated.

        Returns:
            [1 or T, H/8, W/8, 2 z_dim].
        """
        x_THWC = self.conv1(x_THWC, history)
        for layer in self.downsamples:
            x_THWC = layer(x_THWC, history)
        x_THWC = self.middle(x_THWC, history)
        return self.head(x_THWC, history)  # type: ignore[no-any-return]
