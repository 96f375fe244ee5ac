"""Decoder of the Wan2.1 VAE: latent frames to pixel frames, one sample at a time (`x_THWC`, channels last)."""

from __future__ import annotations

from torch import Tensor, nn

from turbo_backend.config import VAEConfig
from turbo_backend.nets.vae_layers import (
    CausalConv3d,
    FrameConv,
    FrameHistory,
    Head,
    MiddleBlocks,
    ResidualBlock,
)


class Upsample(nn.Module):
    """Doubles height and width (nearest pixel, then a 3x3 convolution that halves the channels).

    A temporal one first doubles the frames: a convolution over three frames makes 2C channels, the first C of
    which are the earlier of two frames. The first latent frame of a video is not doubled, and it is no part of
    what later ones see as their past: that begins with zeros (Wan2.1).
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        # 0 is the nearest-pixel upsampling, without parameters.
        self.resample = nn.ModuleDict({"1": FrameConv(channels, channels // 2, (3, 3))})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        num_frames, height, width, channels = x_THWC.shape
        factor = 1
        if self.time_conv is not None:
            if history.has_started(self.time_conv):
                x_THWC = self.time_conv(x_THWC, history)
                factor = 2
            else:
                history.keep(self.time_conv, x_THWC[:0])
        # Both doublings in one copy: [T, factor, H, 2, W, 2, C].
        split = x_THWC.reshape(num_frames, height, 1, width, 1, factor, channels).permute(0, 5, 1, 2, 3, 4, 6)
        doubled = split.expand(-1, -1, -1, 2, -1, 2, -1)
        enlarged_THWC = doubled.reshape(factor * num_frames, 2 * height, 2 * width, channels)
        return self.resample["1"](enlarged_THWC)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """z_dim channels at 1/8 size to 3 channels; T latent frames make 4T frames, the first of a video one."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * mult for mult in reversed(config.dim_mult)]
        self.conv1 = CausalConv3d(config.z_dim, widths[0])
        self.middle = MiddleBlocks(widths[0])
        layers: list[ResidualBlock | Upsample] = []
        channels = widths[0]
        temporal = (*reversed(config.temporal_downsample), None)
        for width, doubles_frames in zip(widths, temporal, strict=True):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(channels, width))
                channels = width
            if doubles_frames is not None:
                layers.append(Upsample(width, temporal=doubles_frames))
                channels = width // 2
        self.upsamples = nn.ModuleList(layers)
        self.head = Head(channels, 3)

    def forward(self, z_THWC: Tensor, history: FrameHistory) -> Tensor:
        """The next frames of one sample.

        Args:
            z_THWC: [T, h, w, z_dim], denormalised; a video's first frame comes alone.
            history: what the sample's earlier frames left; updated.

        Returns:
            [1 or 4T, 8h, 8w, 3].
        """
        x_THWC: Tensor = self.conv1(z_THWC, history)
        x_THWC = self.middle(x_THWC, history)
        for layer in self.upsamples:
            x_THWC = layer(x_THWC, history)
        return self.head(x_THWC, history)  # type: ignore[no-any-return]
