"""Sheets of held-out prompts after each stage: teachers with guidance, students in four steps."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.vae import WanVAE
from turbo_backend.sampler import RCMSchedule, sample_steps
from turbo_training.attention_forward import DENSE, SPARSE
from turbo_training.captions import caption
from turbo_training.dit_forward import Condition
from turbo_training.flow import sample_teacher, velocity_of
from turbo_training.latents import encode_first_frames, with_mask
from turbo_training.scene import sample_scene
from turbo_training.shapes import RunShape
from turbo_training.sheets import to_clip, write_sheet
from turbo_training.text_forward import TextSource
from turbo_training.vae_forward import decode_latents, latent_statistics
from turbo_training.world import render

_PROMPTS = 12
_TEACHER_STEPS = 25


@torch.no_grad()
def draw_samples(shape: RunShape, net: WanDiT, texts: TextSource, vae: WanVAE, *, stage: str, path: Path) -> None:
    """Writes the sheet of a stage: `teacher`, `sla`, `rcm`, or `i2v`, `i2v_sla`, `i2v_rcm`.

    The first column of image-to-video is the image's own frame as the network gives it back.
    """
    device, generator = texts.device, random.Random(11)
    task = "i2v" if stage.startswith("i2v") else "t2v"
    model = shape.image_model if task == "i2v" else shape.model
    changing_light = 0.3 if task == "i2v" else 0.0
    scenes = [sample_scene(generator, held_out=True, changing_light=changing_light) for _ in range(_PROMPTS)]
    captions = [caption(scene, ("en", "zh")[i % 2], generator, task=task) for i, scene in enumerate(scenes)]
    image = None
    if task == "i2v":
        clips = render(scenes, num_frames=shape.num_frames, height=shape.height, width=shape.width, device=device)
        image = with_mask(encode_first_frames(vae, clips).float())
    condition = Condition(texts.embed(captions), image)
    size = (model.vae.z_dim, 1 + (shape.num_frames - 1) // 4, shape.height // 8, shape.width // 8)
    noise = torch.randn(len(scenes), *size, device=device, generator=torch.Generator(device).manual_seed(7))
    function = velocity_of(net, DENSE if stage in ("teacher", "i2v") else SPARSE)
    if stage.endswith("rcm"):

        def student(x: torch.Tensor, timesteps: torch.Tensor, _step: int) -> torch.Tensor:
            return function(x.float(), timesteps.float().to(x.device) / 1000, condition)

        schedule = RCMSchedule(4, model.default_sigma_max)
        *_, last = sample_steps(
            student, lambda step: noise if not step else torch.randn_like(noise), schedule, ode=False
        )
        latents = last.latents.float()
    else:
        latents = sample_teacher(function, noise, condition, texts.embed([""]), num_steps=_TEACHER_STEPS)
    shift, scale = latent_statistics(vae, device)
    drawn = [to_clip(decode_latents(vae, latent[None] * scale + shift)[0]).cpu() for latent in latents]
    write_sheet(drawn, captions, path)
