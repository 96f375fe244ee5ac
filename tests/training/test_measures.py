"""Measures decide rightly about clips whose scenes are known."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from turbo_training.judge import Accuracy, judge, tally
from turbo_training.measures import Measured, MeasuredSubject, measure
from turbo_training.scene import COLORS, MOTIONS, SUBJECTS, Actor, Scene, sample_scene
from turbo_training.validate_measures import validate_measures
from turbo_training.world import render


@pytest.mark.parametrize(("num_actors", "strength"), [(1, 0.0), (1, 1.0), (2, 0.0)])
def test_held_out_clips_are_read_rightly(num_actors: int, strength: float) -> None:
    # `python -m turbo_training validate` measures hundreds; a few tell whether anything broke.
    accuracies = validate_measures(16, num_actors=num_actors, strength=strength, num_frames=17)
    for name, accuracy in accuracies.items():
        assert accuracy.total - accuracy.right <= 1 + (name == "camera"), name


@pytest.mark.parametrize("motion", MOTIONS)
def test_each_motion_of_a_short_clip(motion: str) -> None:
    base = sample_scene(random.Random(3), num_actors=1, camera="pan_left")
    for i, (subject, color) in enumerate(zip(SUBJECTS[::2], COLORS, strict=False)):
        actor = Actor(subject=subject, color=color, motion=motion, phase=0.3 * i)
        scene = Scene(
            actors=(actor,), surroundings=base.surroundings, light=base.light, light_end=base.light_end,
            camera=base.camera, layout=base.layout,
        )  # fmt: skip
        found = measure(render([scene], num_frames=17)[0]).subjects[0]
        assert (found.motion, found.color) == (motion, color)


def test_a_subject_that_stays_is_still_and_an_empty_clip_has_none() -> None:
    scene = sample_scene(random.Random(8), num_actors=1)
    clip = render([scene], num_frames=9)[0]
    frozen = measure(clip[:1].expand(9, -1, -1, -1))
    assert [found.motion for found in frozen.subjects] == ["still"]
    assert frozen.camera == "static"
    grey = measure(torch.full_like(clip, 128))
    assert not any(found.share > 0.01 for found in grey.subjects)


def test_judging_two_subjects_asks_each_for_its_own_color() -> None:
    generator = random.Random(1)
    scene = sample_scene(generator, num_actors=2)
    first, second = scene.actors

    def measured(*colors: str) -> Measured:
        return Measured(
            subjects=tuple(
                MeasuredSubject(subject=actor.subject, color=color, motion=actor.motion, share=0.05)
                for actor, color in zip((first, second), colors, strict=True)
            ),
            surroundings=scene.surroundings, light=scene.light, light_end=scene.light_end, camera=scene.camera,
        )  # fmt: skip

    right = judge(scene, measured(first.color, second.color))
    assert all(itertools.chain.from_iterable(right.values()))
    swapped = judge(scene, measured(second.color, first.color))
    assert swapped["color"] == [False, False]
    assert tally([right, swapped])["color"] == Accuracy(2, 4)
