"""How often the measures are right about clips whose scenes are known: rendered, and degraded as by a lossy decoder."""

from __future__ import annotations

import random

import torch

from turbo_training.judge import Accuracy, judge, tally
from turbo_training.measures import measure, to_frames
from turbo_training.scene import sample_scene
from turbo_training.train_measures import degrade
from turbo_training.world import render


def validate_measures(
    count: int, *, num_actors: int, strength: float, num_frames: int = 33, seed: int = 100
) -> dict[str, Accuracy]:
    """Accuracies by attribute over held-out scenes, a fifth of them with a change of light.

    Args:
        strength: of the degradation (see `train_measures.degrade`); 0 for none.
    """
    generator = random.Random(seed + num_actors)
    verdicts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(count):
            scene = sample_scene(generator, held_out=True, num_actors=num_actors, changing_light=0.2)
            clip = render([scene], num_frames=num_frames)[0]
            if strength:
                frames = degrade(to_frames(clip), generator, strength=strength)
                clip = (frames * 255 + 0.5).byte().permute(0, 2, 3, 1)
            verdicts.append(judge(scene, measure(clip, num_subjects=num_actors)))
    return tally(verdicts)
