"""The VAE: reconstruction, with differences between neighbouring pixels and frames as the perceptual term."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo_backend.nets.vae import WanVAE
from turbo_backend.nets.vae_layers import Convolution, ResidualBlock
from turbo_training.scene import sample_scene
from turbo_training.shapes import RunShape
from turbo_training.sheets import to_clip, to_video, write_sheet
from turbo_training.trainer import EMA, Stage
from turbo_training.vae_forward import decode_latents, encode_moments, fold_statistics
from turbo_training.world import render

#: Weight of the Kullback-Leibler term, a place and channel: enough to bound the latents, not to blur.
_KL = 2e-5
_GRADIENT = 0.5
#: As much as the absolute difference where that is 0.1 (of 2): at edges, where most is lost, several times as much.
_SQUARES = 5.0
#: Share of clips whose frames after the first are grey, as the encoder sees the image of image-to-video.
_GREY_TAILS = 0.1
#: Clips are rendered in groups, one every so many steps; crops are drawn from the last few groups.
_GROUP_EVERY, _GROUPS_KEPT = 200, 4
#: Log-variance at first: with that of N(0, 1) the noise would hide what little the encoder says in the beginning.
_FIRST_LOG_VARIANCE = -6.0


class VAEStage(Stage):
    """Trains `vae` on crops of fresh clips; `ema` is what is kept.

    loss = |x - y| + 5 (x - y)^2 + 0.5 |grad x - grad y| + 2e-5 KL(q(z | x), N(0, 1)),   y decoded from z ~ q(z | x)
    """

    name = "vae"

    def __init__(self, shape: RunShape, *, seed: int, device: torch.device) -> None:
        super().__init__(seed=seed, device=device)
        self.shape = shape
        self.vae = WanVAE(shape.model.vae).to(device)
        initialize_vae(self.vae)
        self.average = WanVAE(shape.model.vae).to(device)
        self.modules = {"vae": self.vae, "ema": self.average}
        self.optimizers = self.make_optimizers(self.vae, _is_inner, betas=(0.9, 0.99), weight_decay=1e-4)
        self._ema = EMA(self.vae, self.average, decay=0.998)
        self._seed = seed
        self._groups: dict[int, Tensor] = {}
        self._num_frames = 1 + 4 * ((min(shape.num_frames, 17) - 1) // 4)
        self._video = torch.empty(shape.vae.batch_size, 3, self._num_frames, shape.crop, shape.crop, device=device)

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        self.set_learning_rates(self.shape.vae.learning_rate, index, progress, warmup=100)
        self._video.copy_(self._draw_crops(index // _GROUP_EVERY))
        losses = self.recorded.run("vae", self._update)
        self._ema.update(index)
        return losses

    def _update(self) -> dict[str, Tensor]:
        video = self._video
        with self.precision():
            mean, log_variance = encode_moments(self.vae, video)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            decoded = decode_latents(self.vae, z)
        pixels = (decoded - video).abs().mean()
        squares = (decoded - video).square().mean()
        edges = gradient_difference(decoded, video)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = pixels + _SQUARES * squares + _GRADIENT * edges + _KL * kl
        self.vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.step_optimizers()
        return {"pixels": pixels, "squares": squares, "edges": edges, "kl": kl}

    def _draw_crops(self, newest: int) -> Tensor:
        """[B, 3, F, crop, crop] in [-1, 1]."""
        shape, draw = self.shape, self.generator
        wanted = range(max(0, newest - _GROUPS_KEPT + 1), newest + 1)
        self._groups = {number: clips for number, clips in self._groups.items() if number in wanted}
        crops = []
        for _ in range(shape.vae.batch_size):
            clips = self._clips(draw.choice(wanted))
            top, left = draw.randint(0, shape.height - shape.crop), draw.randint(0, shape.width - shape.crop)
            crop = clips[draw.randrange(len(clips)), :, top : top + shape.crop, left : left + shape.crop]
            crops.append((crop, draw.random() < _GREY_TAILS))
        video = to_video(torch.stack([crop for crop, _ in crops]))
        for row, (_, is_grey) in enumerate(crops):
            if is_grey:
                video[row, :, 1:] = 0
        return video

    def _clips(self, number: int) -> Tensor:
        """A group of clips, uint8 [N, F, H, W, 3], which its number alone decides: a resumed run has the same."""
        if number not in self._groups:
            shape, draw = self.shape, random.Random(f"{self._seed} {number}")
            scenes = [sample_scene(draw, changing_light=0.15) for _ in range(32 * shape.vae.batch_size)]
            self._groups[number] = render(
                scenes, num_frames=self._num_frames, height=shape.height, width=shape.width, device=self.device
            )
        return self._groups[number]

    @torch.no_grad()
    def after(self, folder: Path) -> None:
        """Folds the latents' statistics into the weights that are kept, and draws originals over reconstructions."""
        self._fold(folder)
        scenes = [sample_scene(random.Random(i), held_out=True) for i in range(4)]
        shape = self.shape
        clips = render(
            scenes, num_frames=shape.num_frames, height=shape.height, width=shape.width, device=self.device
        ).cpu()
        decoded = [to_clip(reconstruct(self.average, clip[None].to(self.device))[0]).cpu() for clip in clips]
        pairs = [clip for pair in zip(clips, decoded, strict=True) for clip in pair]
        names = [f"{psnr(one, two):.1f} dB" for one, two in zip(clips, decoded, strict=True)]
        write_sheet(pairs, [text for name in names for text in ("original", name)], folder / "sheet.png")

    def _fold(self, folder: Path) -> None:
        shape, draw = self.shape, random.Random(1)
        total = squares = torch.zeros(shape.model.vae.z_dim, device=self.device, dtype=torch.float64)
        count = 0
        for _ in range(4):
            scenes = [sample_scene(draw) for _ in range(shape.vae.batch_size)]
            clips = render(
                scenes, num_frames=shape.num_frames, height=shape.height, width=shape.width, device=self.device
            )
            for clip in to_video(clips):
                mean = encode_moments(self.average, clip[None])[0].double()
                total = total + mean.sum((0, 2, 3, 4))
                squares = squares + mean.square().sum((0, 2, 3, 4))
                count += mean[:, 0].numel()
        mean_C = total / count
        std_C = (squares / count - mean_C.square()).clamp_min(1e-8).sqrt()
        fold_statistics(self.average, mean_C.float(), std_C.float())
        torch.save(self.average.state_dict(), folder / "vae.pt")


def _is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Convolutions from features to features: not those from or to pixels and latents, nor biases and scales."""
    return parameter.dim() >= 4 and name.startswith(("encoder.down", "encoder.mid", "decoder.mid", "decoder.up"))


@torch.no_grad()
def initialize_vae(vae: WanVAE) -> None:
    """Convolutions by fan-in at unit gain, residual branches from zero; latents begin with little noise.

    With PyTorch's own initial weights, a third as large, signals fade on the way and the loss stays where it is.
    """
    for module in vae.modules():
        if isinstance(module, Convolution):
            nn.init.normal_(module.weight, std=math.prod(module.weight.shape[1:]) ** -0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.residual["6"].weight)  # type: ignore[arg-type]
    z_dim = vae.config.z_dim
    vae.conv1.weight[z_dim:] *= 0.1
    vae.conv1.bias[z_dim:] = _FIRST_LOG_VARIANCE


def load_vae(shape: RunShape, folder: Path, device: torch.device) -> WanVAE:
    """The finished VAE of a run, statistics folded in."""
    vae = WanVAE(shape.model.vae)
    vae.load_state_dict(torch.load(folder / "vae.pt", map_location="cpu", weights_only=True))
    return vae.to(device).eval().requires_grad_(False)


def gradient_difference(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the gradients in time, height and width."""
    difference = x - y
    return sum(
        (difference.narrow(dim, 1, difference.shape[dim] - 1) - difference.narrow(dim, 0, difference.shape[dim] - 1))
        .abs()
        .mean()
        for dim in (2, 3, 4)
        if difference.shape[dim] > 1
    )  # type: ignore[return-value]


def reconstruct(vae: WanVAE, clips: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] through the VAE, [B, 3, F, H, W] in [-1, 1]."""
    return decode_latents(vae, encode_moments(vae, to_video(clips))[0])


def psnr(one: Tensor, two: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 clips, in dB."""
    error = F.mse_loss(one.float(), two.float())
    return float(10 * torch.log10(255**2 / error.clamp_min(1e-6)))
