"""Clips of held-out prompts from the network of a stage, to look at and to judge: batches, by the training forwards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.vae import WanVAE
from turbo_backend.sampler import RCMSchedule, sample_steps
from turbo_training.attention_forward import DENSE, SPARSE, TrainingAttention
from turbo_training.captions import caption
from turbo_training.dit_forward import Condition
from turbo_training.flow import sample_teacher, velocity_of
from turbo_training.judge import Verdict, judge
from turbo_training.latents import CHANGING_LIGHT, encode_first_frames, with_mask
from turbo_training.measures import measure
from turbo_training.scene import Scene, sample_scene
from turbo_training.shapes import RunShape
from turbo_training.sheets import to_clip, write_sheet
from turbo_training.text_forward import TextSource
from turbo_training.vae_forward import decode_latents, latent_statistics
from turbo_training.world import render

_ON_SHEET, _BATCH = 12, 32
_GUIDED_STEPS, _STUDENT_STEPS = 25, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSampler:
    """The network of a stage with what it needs to make clips.

    Attributes:
        stage: `teacher`, `sla`, `rcm`, or `i2v`, `i2v_sla`, `i2v_rcm`: says what it takes, and that those of `rcm` take
            `num_steps` and all others 25 with guidance.
        attention: by default the one that the stage is trained for.
    """

    stage: str
    shape: RunShape
    net: WanDiT
    texts: TextSource
    vae: WanVAE
    attention: TrainingAttention | None = None
    num_steps: int = _STUDENT_STEPS

    @property
    def task(self) -> str:
        return "i2v" if self.stage.startswith("i2v") else "t2v"

    def write_sheet(self, path: Path) -> None:
        """A contact sheet; the first column of image-to-video is the image's own frame as the network gives it back."""
        scenes, captions = self._draw_prompts(random.Random(11), _ON_SHEET)
        write_sheet(self._sample(scenes, captions, seed=7), captions, path)

    def judge(self, count: int) -> list[Verdict]:
        """Verdicts on clips of `count` held-out prompts, English and Chinese by turns."""
        generator = random.Random(12)
        verdicts: list[Verdict] = []
        with ThreadPoolExecutor() as pool:
            for begin in range(0, count, _BATCH):
                scenes, captions = self._draw_prompts(generator, min(_BATCH, count - begin))
                clips = self._sample(scenes, captions, seed=begin)
                verdicts += pool.map(
                    lambda scene, clip: judge(scene, measure(clip, num_subjects=len(scene.actors))), scenes, clips
                )
        return verdicts

    def _draw_prompts(self, generator: random.Random, count: int) -> tuple[list[Scene], list[str]]:
        changing_light = CHANGING_LIGHT[self.task]
        scenes = [sample_scene(generator, held_out=True, changing_light=changing_light) for _ in range(count)]
        return scenes, [caption(s, ("en", "zh")[i % 2], generator, task=self.task) for i, s in enumerate(scenes)]

    @torch.no_grad()
    def _sample(self, scenes: Sequence[Scene], captions: Sequence[str], *, seed: int) -> list[Tensor]:
        """Clips uint8 [F, H, W, 3]."""
        shape, device = self.shape, self.texts.device
        model, image = shape.model, None
        if self.task == "i2v":
            model = shape.image_model
            size = {"num_frames": shape.num_frames, "height": shape.height, "width": shape.width}
            image = with_mask(encode_first_frames(self.vae, render(scenes, device=device, **size)).float())
        condition = Condition(self.texts.embed(captions), image)
        latent_size = (model.vae.z_dim, 1 + (shape.num_frames - 1) // 4, shape.height // 8, shape.width // 8)
        generator = torch.Generator(device).manual_seed(seed)

        def draw() -> Tensor:
            return torch.randn(len(scenes), *latent_size, device=device, generator=generator)

        function = velocity_of(self.net, self.attention or (DENSE if self.stage in ("teacher", "i2v") else SPARSE))
        if self.stage.endswith("rcm"):

            def student(x: Tensor, timesteps: Tensor, _step: int) -> Tensor:
                return function(x.float(), timesteps.float().to(device) / 1000, condition)

            schedule = RCMSchedule(self.num_steps, model.default_sigma_max)
            *_, last = sample_steps(student, lambda _step: draw(), schedule, ode=False)
            latents = last.latents.float()
        else:
            latents = sample_teacher(function, draw(), condition, self.texts.embed([""]), num_steps=_GUIDED_STEPS)
        shift, scale = latent_statistics(self.vae, device)
        return [to_clip(decode_latents(self.vae, latent[None] * scale + shift)[0]).cpu() for latent in latents]
