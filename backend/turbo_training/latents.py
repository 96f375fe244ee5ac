"""Latents of many clips, encoded once and kept on the device, for all stages of the denoiser."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_backend.nets.vae import WanVAE
from turbo_training.scene import Scene, sample_scene
from turbo_training.shapes import RunShape
from turbo_training.sheets import to_video
from turbo_training.vae_forward import encode_moments, normalize_latents
from turbo_training.world import render

#: Share of the clips that are half as long.
_SHORT = 0.2


@dataclass(frozen=True, slots=True)
class LatentBank:
    """Scenes and their latents: those of full length and the shorter ones, each bfloat16 [N, 16, T, h, w]."""

    scenes: tuple[list[Scene], list[Scene]]
    latents: tuple[Tensor, Tensor]

    def draw(self, batch_size: int, generator: random.Random) -> tuple[list[Scene], Tensor]:
        """A batch of one length: scenes and float32 latents."""
        short = int(generator.random() < _SHORT and len(self.scenes[1]) > 0)
        rows = [generator.randrange(len(self.scenes[short])) for _ in range(batch_size)]
        chosen = torch.tensor(rows, device=self.latents[short].device)
        return [self.scenes[short][row] for row in rows], self.latents[short][chosen].float()


@torch.no_grad()
def fill_bank(
    vae: WanVAE, shape: RunShape, *, seed: int, device: torch.device, minutes: float, at_once: int = 8
) -> LatentBank:
    """Renders and encodes scenes of training until there are enough or the time is up, whichever comes first.

    The same seed gives the same scenes in the same order, however many there are.
    """
    generator = random.Random(seed)
    scenes: tuple[list[Scene], list[Scene]] = ([], [])
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    end = time.monotonic() + 60 * minutes
    short_frames = 1 + 4 * ((shape.num_frames - 1) // 8)
    while len(scenes[0]) + len(scenes[1]) < shape.num_latents and (time.monotonic() < end or not scenes[0]):
        short = int(generator.random() < _SHORT and short_frames > 1)
        batch = [sample_scene(generator) for _ in range(min(at_once, shape.num_latents))]
        num_frames = short_frames if short else shape.num_frames
        clips = render(batch, num_frames=num_frames, height=shape.height, width=shape.width, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, _ = encode_moments(vae, to_video(clips))
        scenes[short].extend(batch)
        parts[short].append(normalize_latents(vae, mean).to(torch.bfloat16))
    if not parts[1]:
        parts[1].append(parts[0][0][:0])
    return LatentBank(scenes, (torch.cat(parts[0]), torch.cat(parts[1])))
