"""How well image-to-video keeps its image and does what its prompt says, on scenes held out of training."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from turbo_backend.parameters import Delivery
from turbo_backend.pipeline import Pipeline
from turbo_training.captions import caption
from turbo_training.judge import judge
from turbo_training.measures import measure
from turbo_training.scene import sample_scene
from turbo_training.train_vae import psnr
from turbo_training.world import render


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageVerdict:
    """One clip: its first frame against the image, in dB, and whether each subject moves as the prompt says."""

    text: str
    clip: torch.Tensor
    first_frame: float
    motions: tuple[bool, ...]


def measure_image_to_video(
    pipeline: Pipeline, *, num_prompts: int, num_frames: int, seed: int = 2026
) -> Iterator[ImageVerdict]:
    """Gives first frames of held-out clips to the stages that serve, with captions in English and Chinese by turns."""
    generator = random.Random(seed)
    for i in range(num_prompts):
        scene = sample_scene(generator, held_out=True)
        text = caption(scene, ("en", "zh")[i % 2], generator, task="i2v")
        first = render([scene], num_frames=num_frames)[0, 0]
        video = pipeline.generate(
            text,
            image=_png(first),
            delivery=Delivery(container="raw", preview=False),
            seed=2000 + i,
            num_frames=num_frames,
            sla_topk=0.15,
        )
        clip = torch.from_numpy(video.frames)
        verdict = judge(scene, measure(clip, num_subjects=len(scene.actors)))
        motions = tuple(verdict["motion"])
        yield ImageVerdict(text=text, clip=clip, first_frame=psnr(first, clip[0]), motions=motions)


def _png(pixels_HWC: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC.numpy()).save(buffer, "PNG")
    return buffer.getvalue()
