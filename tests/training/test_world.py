"""The procedural world: what scenes say is what clips show, and nothing held out reaches training."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from turbo_training.captions import LANGUAGES, TASKS, caption
from turbo_training.scene import (
    CAMERAS,
    COLORS,
    LIGHTS,
    MOTIONS,
    NUM_LAYOUT_NUMBERS,
    SUBJECTS,
    SURROUNDINGS,
    Actor,
    Scene,
    is_held_out,
    is_held_out_actor,
    is_held_out_place,
    sample_scene,
)
from turbo_training.world import camera_path, render, render_labels, subject_paths


def make_scene(*actors: Actor, camera: str = "static", light_end: str = "day") -> Scene:
    return Scene(
        actors=actors or (Actor(subject="square", color="red", motion="right"),),
        surroundings="meadow",
        light="day",
        light_end=light_end,
        camera=camera,
        layout=(0.3,) * NUM_LAYOUT_NUMBERS,
    )


def test_the_world_is_as_large_as_promised() -> None:
    sizes = [len(names) for names in (SUBJECTS, COLORS, MOTIONS, SURROUNDINGS, LIGHTS)]
    assert sizes == [6, 8, 8, 6, 3]
    assert {"pan_left", "pan_right", "zoom_in", "zoom_out", "static"} == set(CAMERAS)


def test_each_pair_of_attributes_stays_in_training() -> None:
    actors = [
        Actor(subject=s, color=c, motion=m)
        for s, c, m in itertools.product(SUBJECTS, COLORS, MOTIONS)
        if not is_held_out_actor(Actor(subject=s, color=c, motion=m))
    ]
    assert len(actors) == 6 * 8 * 8 * 7 // 8
    assert len({(a.subject, a.color) for a in actors}) == 48
    assert len({(a.subject, a.motion) for a in actors}) == 48
    assert len({(a.color, a.motion) for a in actors}) == 64
    places = [
        (a.subject, p, light)
        for a, p, light in itertools.product(actors, SURROUNDINGS, LIGHTS)
        if not is_held_out_place(a, p, light)
    ]
    assert len({(s, p) for s, p, _ in places}) == 36
    assert len({(s, light) for s, _, light in places}) == 18


def test_training_never_shows_what_is_held_out() -> None:
    generator = random.Random(0)
    assert not any(is_held_out(sample_scene(generator, changing_light=0.5)) for _ in range(300))
    for scene in (sample_scene(generator, held_out=True) for _ in range(100)):
        assert all(is_held_out_actor(actor) for actor in scene.actors)
        assert is_held_out_place(scene.actors[0], scene.surroundings, scene.light)


def test_motions_are_drawn_from_those_given_as_often_as_they_stand_there() -> None:
    generator = random.Random(0)
    drawn = Counter(sample_scene(generator, motions=("up", "spin", "spin")).actors[0].motion for _ in range(600))
    assert set(drawn) == {"up", "spin"}
    assert 1.6 < drawn["spin"] / drawn["up"] < 2.5


def test_a_scene_refuses_what_it_cannot_show() -> None:
    with pytest.raises(ValueError, match="subject is 'dog'"):
        Actor(subject="dog", color="red", motion="up")
    with pytest.raises(ValueError, match="different subjects"):
        make_scene(*[Actor(subject="cat", color=color, motion="up") for color in ("red", "blue")])
    with pytest.raises(ValueError, match="num_frames is 1"):
        render([make_scene()], num_frames=1)


def test_equal_scenes_give_equal_pixels_in_any_batch() -> None:
    generator = random.Random(4)
    scenes = [sample_scene(generator) for _ in range(3)]
    together = render(scenes, num_frames=5, at_once=3)
    assert together.dtype == torch.uint8
    assert together.shape == (3, 5, 144, 256, 3)
    for scene, clip in zip(scenes, together, strict=True):
        alone = render([scene], num_frames=5)[0]
        assert (alone.int() - clip.int()).abs().max() <= 1


@pytest.mark.parametrize(("height", "width"), [(192, 192), (160, 208), (208, 160), (144, 256), (256, 144)])
def test_subjects_stay_in_every_frame_shape(height: int, width: int) -> None:
    generator = random.Random(5)
    for num_actors in (1, 2):
        scenes = [sample_scene(generator, num_actors=num_actors) for _ in range(40)]
        for slot in range(num_actors):
            middle, radius, _ = subject_paths(scenes, slot, num_frames=17, height=height, width=width)
            assert (middle[..., 0] > 0.6 * radius).all()
            assert (middle[..., 0] < width - 0.6 * radius).all()
            assert (middle[..., 1] > 0.6 * radius).all()
            assert (middle[..., 1] < height - 0.6 * radius).all()
        clips = render(scenes[:2], num_frames=5, height=height, width=width)
        assert clips.shape == (2, 5, height, width, 3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_go_where_they_say(motion: str) -> None:
    scene = make_scene(Actor(subject="cat", color="red", motion=motion, phase=0.2))
    middle, radius, angle = subject_paths([scene], 0, num_frames=33, height=144, width=256)
    (dx, dy), x, y = (middle[0, -1] - middle[0, 0]).tolist(), middle[0, :, 0], middle[0, :, 1]
    match motion:
        case "left" | "right":
            assert (dx > 40) == (motion == "right")
            assert abs(dx) > 40
        case "up" | "down":
            assert (dy > 40) == (motion == "down")
            assert abs(dy) > 40
        case "bounce":
            assert ((y[1:-1] < y[:-2]) & (y[1:-1] < y[2:])).sum() == 2
        case "circle":
            assert abs(dx) + abs(dy) < 1
            assert float(x.max() - x.min()) > 40
            assert float(y.max() - y.min()) > 40
        case "grow":
            assert radius[0, -1] > 2 * radius[0, 0]
        case "spin":
            assert angle[0, -1] == pytest.approx(2 * torch.pi)


def test_the_camera_moves_the_surroundings() -> None:
    assert camera_path(make_scene(camera="pan_right"), 5)[:, 0].diff().gt(0).all()
    assert camera_path(make_scene(camera="zoom_in"), 5)[:, 1].diff().gt(0).all()
    still, moving = render([make_scene(), make_scene(camera="pan_left")], num_frames=5).float()
    sky = (slice(None), slice(0, 20))
    assert (still[0][sky[1]] - still[-1][sky[1]]).abs().mean() < 0.5
    assert (moving[0] - moving[-1]).abs().mean() > 3


def test_light_changes_over_a_clip() -> None:
    clip = render([make_scene(light_end="night")], num_frames=9)[0].float()
    brightness = clip.mean((1, 2, 3))
    assert brightness[0] > 1.8 * brightness[-1]


def test_labels_lie_on_the_subjects() -> None:
    scene = make_scene()
    labels = render_labels([scene], num_frames=3, height=144, width=256, label_height=72, label_width=128)[0]
    clip = render([scene], num_frames=3)[0, :, ::2, ::2].float()
    inside = clip[labels == 1 + SUBJECTS.index("square")]
    is_red = (inside[:, 0] > 2 * inside[:, 1]).float().mean()
    assert is_red > 0.7
    outside = clip[labels == 0]
    assert ((outside[:, 0] > 150) & (outside[:, 1] < 60)).float().mean() < 0.01


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_keep_to_their_language(language: str, task: str) -> None:
    generator = random.Random(6)
    texts = {caption(sample_scene(generator, changing_light=0.5), language, generator, task=task) for _ in range(200)}
    assert len(texts) > 120
    for text in texts:
        assert text == " ".join(text.split())
        has_latin = any(letter.isascii() and letter.isalpha() for letter in text)
        assert has_latin == (language != "zh")
        assert text.isascii() == (language == "en")


def test_captions_name_the_color_of_each_subject() -> None:
    generator = random.Random(7)
    scene = make_scene(
        Actor(subject="cat", color="purple", motion="spin"), Actor(subject="car", color="orange", motion="left")
    )
    for _ in range(50):
        text = caption(scene, "en", generator)
        assert text.index("purple") < text.index("orange")
        assert "car" in text
    assert caption(replace(scene, camera="zoom_in"), "zh", generator)
    with pytest.raises(ValueError, match="fr"):
        caption(scene, "fr", generator)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_free_captions_say_the_light_in_words_or_as_an_adjective_and_leave_out_daylight_alone(language: str) -> None:
    generator = random.Random(5)
    said = {
        "en": {"night": ("night", "stars", "dark", "moon", "starry"), "neon": ("neon",)},
        "zh": {"night": ("夜", "星空", "月", "黑"), "neon": ("霓虹",)},
    }[language]
    by_light: dict[str, list[str]] = {"day": [], "night": [], "neon": []}
    for _ in range(600):
        scene = sample_scene(generator)
        by_light[scene.light].append(caption(scene, language, generator, free=True).lower())
    for light, words in said.items():
        assert all(any(word in text for word in words) for text in by_light[light]), light
    unsaid = [text for text in by_light["day"] if not any(word in text for word in ("sun", "day", "bright", "light"))]
    if language == "en":
        assert 0.05 < len(unsaid) / len(by_light["day"]) < 0.3, "daylight is what nothing says otherwise"
    styled = [text for texts in by_light.values() for text in texts if "cinematic" in text or "电影感" in text]
    assert styled, "words of style are there"


def test_plain_captions_are_what_quality_was_measured_with() -> None:
    """Other wordings would make other prompts of the same seeds."""
    generator = random.Random(3)
    scene = sample_scene(generator)
    texts = [caption(scene, "en", random.Random(seed)) for seed in range(20)]
    assert not any("cinematic" in text or "sunny meadow" in text for text in texts)
