"""The text encoder's training: what is asked of its rows, and how it begins."""

from __future__ import annotations

import pytest
import torch

from turbo_backend.nets.umt5 import UMT5Encoder, relative_buckets
from turbo_training.scene import COLORS, MOTIONS, SUBJECTS, Actor, Scene
from turbo_training.shapes import FULL, SMOKE, RunShape
from turbo_training.train_text import answers_of, initialize_encoder

pytestmark = pytest.mark.training


def make_scene(*actors: Actor) -> Scene:
    place = {"surroundings": "beach", "light": "day", "light_end": "day", "camera": "static"}
    return Scene(actors=actors, layout=(0.5,) * 6, **place)


def test_answers_tell_the_first_subject_from_the_second() -> None:
    cat = Actor(subject="cat", color="red", motion="left")
    car = Actor(subject="car", color="blue", motion="spin")
    scenes = [make_scene(cat, car), make_scene(car, cat), make_scene(cat), make_scene(cat)]
    of_scene, of_subjects = answers_of(scenes, [False, False, False, True], torch.device("cpu"))
    numbers = [1 + SUBJECTS.index("cat"), 1 + COLORS.index("red"), 1 + MOTIONS.index("left")]
    others = [1 + SUBJECTS.index("car"), 1 + COLORS.index("blue"), 1 + MOTIONS.index("spin")]
    assert of_subjects.tolist() == [[numbers, others], [others, numbers], [numbers, [0] * 3], [[-100] * 3] * 2]
    assert of_scene[:, -1].tolist() == [-100, -100, MOTIONS.index("left"), MOTIONS.index("left")]


@pytest.mark.parametrize("shape", [FULL, SMOKE])
def test_a_new_encoder_looks_at_what_is_near(shape: RunShape) -> None:
    config = shape.model.text_encoder
    torch.manual_seed(0)
    encoder = UMT5Encoder(config)
    initialize_encoder(encoder)
    length = 60
    buckets = relative_buckets(length, num_buckets=config.num_buckets, max_distance=config.max_distance)
    for block in encoder.blocks:
        bias = block.pos_embedding(buckets)[0]  # type: ignore[operator]  # [heads, query, key]
        row = bias[:, 20].detach()
        both_sides = row[0]
        assert both_sides[19] > both_sides[10] > both_sides[0]
        assert both_sides[21] > both_sides[30] > both_sides[55]
        if config.num_heads > 2:
            assert (row[2, 15:20] > row[2, 21:26].flip(0) + 3).all(), "this head looks back"
            assert (row[3, 21:26] > row[3, 15:20].flip(0) + 3).all(), "this head looks ahead"
