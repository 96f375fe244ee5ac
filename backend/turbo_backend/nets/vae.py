"""The causal video VAE of Wan2.1 (also used by Wan2.2-A14B): 8x8 pixels and 4 frames to one latent of 16 channels.

Shapes: B batch, T latent frames, h, w latent height and width, F = 4 (T - 1) + 1 frames, H = 8 h, W = 8 w.
Latents are the normalised ones on both sides: latents = (mean - latents_mean) / latents_std, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from turbo_backend.config import VAEConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.vae_decoder import Decoder
from turbo_backend.nets.vae_decoder_fused import FusedDecoder, fits_kernels
from turbo_backend.nets.vae_encoder import Encoder
from turbo_backend.nets.vae_layers import FrameConv, FrameHistory
from turbo_backend.nets.vae_still import StillEncoder

#: Frames that make one latent frame, and pixels a side that make one latent pixel.
TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8


class WanVAE(nn.Module):
    """Encoder and decoder with the parameter names of `Wan2.1_VAE.pth`.

    The samples of a batch run one after another: a chunk of one already fills the device, the memory is that of
    one, and no bit of a sample can depend on its neighbours.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = FrameConv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = FrameConv(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self._fused_decoder: FusedDecoder | None = None
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, chunk_latents: int = 1) -> Tensor:
        """Latents to frames.

        Args:
            latents: [B, z_dim, T, h, w], normalised.
            chunk_latents: see `decode_chunks`.

        Returns:
            [B, 3, F, H, W] in the dtype of the weights, [-1, 1], not clamped.

        Raises:
            InvalidArgument: latents of another shape, or `chunk_latents` below 1.
        """
        self._check_latents(latents)
        batch, _, num_latents, height, width = latents.shape
        num_frames = TEMPORAL_FACTOR * (num_latents - 1) + 1
        frames = self.conv2.weight.new_empty(batch, 3, num_frames, SPATIAL_FACTOR * height, SPATIAL_FACTOR * width)
        for i_sample in range(batch):
            begin = 0
            for chunk in self.decode_chunks(latents[i_sample : i_sample + 1], chunk_latents=chunk_latents):
                end = begin + chunk.shape[2]
                frames[i_sample, :, begin:end] = chunk[0]
                begin = end
        return frames

    @torch.inference_mode()
    def decode_chunks(self, latents: Tensor, *, chunk_latents: int = 1) -> Iterator[Tensor]:
        """Latents to frames, chunk by chunk; together they are exactly `decode` with the same `chunk_latents`.

        Args:
            latents: [B, z_dim, T, h, w], normalised.
            chunk_latents: latent frames decoded at once; the first is always alone. More take more memory and may
                run faster; the maths is the same, the order of floating-point sums may differ.

        Yields:
            [B, 3, 1, H, W], then [B, 3, up to 4 chunk_latents, H, W], as `decode`.

        Raises:
            InvalidArgument: latents of another shape, or `chunk_latents` below 1.
        """
        self._check_latents(latents)
        if chunk_latents < 1:
            raise InvalidArgument("chunk_latents", chunk_latents, "at least 1")
        num_latents = latents.shape[2]
        histories = [FrameHistory() for _ in latents]
        begin, end = 0, 1
        while begin < num_latents:
            if end >= num_latents:
                for history in histories:
                    history.finish()
            yield torch.stack(
                [
                    self._decode_next(sample[:, begin:end], history)
                    for sample, history in zip(latents, histories, strict=True)
                ]
            )
            begin, end = end, end + chunk_latents

    @torch.inference_mode()
    def decode_frame(self, latents: Tensor) -> Tensor:
        """One latent frame decoded as the first of a video, for previews: [B, z_dim, 1, h, w] to [B, 3, 1, H, W].

        Raises:
            InvalidArgument: latents of another shape.
        """
        self._check_latents(latents)
        if latents.shape[2] != 1:
            raise InvalidArgument("latents", tuple(latents.shape), "of one latent frame, [B, z_dim, 1, h, w]")
        return self.decode(latents)

    @torch.inference_mode()
    def kernel_error(self, latents: Tensor) -> float:
        """How far the fused decoder is from the plain layers in the same dtype: ||difference|| / ||plain||.

        Args:
            latents: [1, z_dim, 2, h, w], normalised; the second latent frame is compared.

        Raises:
            InvalidArgument: latents of another shape.
        """
        self._check_latents(latents)
        if latents.shape[0] != 1 or latents.shape[2] != 2:
            raise InvalidArgument("latents", tuple(latents.shape), "of one sample of two latent frames")
        frames, plain = (self._decode_second(latents[0], by_kernels=by_kernels).float() for by_kernels in (True, False))
        error = (frames - plain).norm() / plain.norm()
        return float(error) if bool(error.isfinite()) else math.inf

    def _decode_second(self, latents_CTHW: Tensor, *, by_kernels: bool) -> Tensor:
        history = FrameHistory()
        self._decode_next(latents_CTHW[:, :1], history)
        return self._decode_next(latents_CTHW[:, 1:], history, by_kernels=by_kernels)

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """Frames to the normalised mean of their latent distribution.

        Args:
            video: [B, 3, F, H, W] in [-1, 1], F = 4k + 1, H and W multiples of 8.

        Returns:
            [B, z_dim, T, h, w] in fp32.

        Raises:
            InvalidArgument: a video of another shape.
        """
        batch, channels, num_frames, height, width = video.shape if video.dim() == 5 else (0, 0, 0, 0, 0)
        sizes_fit = min(height, width) > 0 and height % SPATIAL_FACTOR == 0 and width % SPATIAL_FACTOR == 0
        if not (batch and channels == 3 and num_frames % TEMPORAL_FACTOR == 1 and sizes_fit):
            fits = "[B, 3, 4k + 1, H, W] with H and W multiples of 8"
            raise InvalidArgument("video", tuple(video.shape), fits)
        return torch.stack([self._encode_sample(sample) for sample in video])

    @torch.inference_mode()
    def encode_image(self, image: Tensor, *, num_frames: int) -> Tensor:
        """An image followed by frames of 0 (mid-grey): what `encode` gives for that video, but sooner.

        Args:
            image: [3, H, W] in [-1, 1], H and W multiples of 8.
            num_frames: of the video, 4k + 1.

        Returns:
            [z_dim, T, h, w] in fp32.

        Raises:
            InvalidArgument: sizes that do not fit.
        """
        fits = image.dim() == 3 and image.shape[0] == 3 and all(n and n % SPATIAL_FACTOR == 0 for n in image.shape[1:])
        if not fits or num_frames < 1 or num_frames % TEMPORAL_FACTOR != 1:
            shown = (tuple(image.shape), num_frames)
            raise InvalidArgument("image, num_frames", shown, "[3, H, W] with H and W multiples of 8, and 4k + 1")
        weight = self.conv1.weight
        image_1HWC = image.permute(1, 2, 0)[None].to(weight).contiguous()
        grey_THWC = image_1HWC.new_zeros(2, *image_1HWC.shape[1:])
        still = StillEncoder(self.encoder, image_1HWC, grey_THWC)
        return self._to_latents([self.conv1(frame) for frame in still(1 + num_frames // TEMPORAL_FACTOR)])

    def _encode_sample(self, video_CFHW: Tensor) -> Tensor:
        history = FrameHistory()
        weight = self.conv1.weight
        num_frames = video_CFHW.shape[1]
        moments_THWC: list[Tensor] = []
        begin, end = 0, 1
        while begin < num_frames:
            if end >= num_frames:
                history.finish()
            chunk_THWC = video_CFHW[:, begin:end].permute(1, 2, 3, 0).to(weight).contiguous()
            moments_THWC.append(self.conv1(self.encoder(chunk_THWC, history)))
            begin, end = end, end + TEMPORAL_FACTOR
        return self._to_latents(moments_THWC)

    def _to_latents(self, moments_THWC: list[Tensor]) -> Tensor:
        """Mean and log-variance, chunk by chunk, to the normalised mean [z_dim, T, h, w]."""
        mean_THWC = torch.cat(moments_THWC)[..., : self.config.z_dim].float()
        shift, scale = self._latent_statistics(mean_THWC.device)
        return ((mean_THWC - shift) / scale).permute(3, 0, 1, 2).contiguous()

    def _decode_next(self, latents_CTHW: Tensor, history: FrameHistory, *, by_kernels: bool = True) -> Tensor:
        """[z_dim, T, h, w] of one sample to [3, 1 or 4T, H, W]."""
        weight = self.conv2.weight
        shift, scale = self._latent_statistics(weight.device)
        latents_THWC = latents_CTHW.permute(1, 2, 3, 0).to(weight.device, torch.float32)
        z_THWC = (latents_THWC * scale + shift).to(weight.dtype).contiguous()
        z_THWC = self.conv2(z_THWC)
        decoder = self._decoder_for(z_THWC, history) if by_kernels else self.decoder
        frames_THWC = decoder(z_THWC, history)
        return frames_THWC.permute(3, 0, 1, 2)

    def _decoder_for(self, z_THWC: Tensor, history: FrameHistory) -> Callable[[Tensor, FrameHistory], Tensor]:
        """The decoder, or its fused form: in 16 bits on a CUDA device, once a video's first frame is done.

        In fp32 there are no tensor cores to feed, and the plain layers are the reference.
        """
        is_first = not history.has_started(self.decoder.conv1)
        fits = z_THWC.is_cuda and z_THWC.dtype in (torch.bfloat16, torch.float16) and fits_kernels(self.decoder)
        if is_first or not fits:
            return self.decoder
        if self._fused_decoder is None or not self._fused_decoder.is_current():
            self._fused_decoder = None  # frees the old weights first
            self._fused_decoder = FusedDecoder(self.decoder)
        return self._fused_decoder

    def _latent_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # No buffers: those would follow the module to bf16 (as upstream's do, an error of up to 0.4 %). Kept for the
        # device, since copying them there waits for all work before.
        if device not in self._statistics:
            mean = torch.tensor(self.config.latents_mean, dtype=torch.float32, device=device)
            std = torch.tensor(self.config.latents_std, dtype=torch.float32, device=device)
            self._statistics[device] = mean, std
        return self._statistics[device]

    def _check_latents(self, latents: Tensor) -> None:
        if latents.dim() != 5 or latents.shape[1] != self.config.z_dim or 0 in latents.shape:
            fits = f"[B, {self.config.z_dim}, T, h, w], none of them 0"
            raise InvalidArgument("latents", tuple(latents.shape), fits)
