"""What a clip of the procedural world shows: attributes, how they are drawn, and which combinations are held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SUBJECTS = ("circle", "square", "triangle", "star", "cat", "car")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
MOTIONS = ("left", "right", "up", "down", "bounce", "circle", "grow", "spin")
CAMERAS = ("static", "pan_left", "pan_right", "zoom_in", "zoom_out")
SURROUNDINGS = ("meadow", "beach", "city", "mountains", "desert", "forest")
LIGHTS = ("day", "night", "neon")

#: Numbers in [0, 1) that vary the layout of surroundings (places of hills, heights of houses, the sun).
NUM_LAYOUT_NUMBERS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """One subject of a scene.

    Attributes:
        subject, color, motion: of `SUBJECTS`, `COLORS`, `MOTIONS`.
        size: factor on the subject's ordinary radius, about 1.
        offset: displacement of its path from the usual place, as shares of the room it has, -1 to 1.
        phase: turns at which `circle` begins its orbit, 0 to 1.
    """

    subject: str
    color: str
    motion: str
    size: float = 1.0
    offset: tuple[float, float] = (0.0, 0.0)
    phase: float = 0.0

    def __post_init__(self) -> None:
        _check("subject", self.subject, SUBJECTS)
        _check("color", self.color, COLORS)
        _check("motion", self.motion, MOTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A clip, wholly: equal scenes give equal pixels.

    Attributes:
        actors: one or two; of two, the first is on the left (above, in portrait).
        light: at the beginning.
        light_end: at the end; another than `light` in clips whose surroundings change.
        camera: moves the surroundings alone; subjects keep their paths on the screen.
        layout: `NUM_LAYOUT_NUMBERS` numbers in [0, 1).
    """

    actors: tuple[Actor, ...]
    surroundings: str
    light: str
    light_end: str
    camera: str
    layout: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.actors) <= 2:
            raise ValueError(f"a scene has one or two actors, not {len(self.actors)}")
        if len({actor.subject for actor in self.actors}) != len(self.actors):
            raise ValueError("two actors of a scene must be different subjects")
        _check("surroundings", self.surroundings, SURROUNDINGS)
        _check("light", self.light, LIGHTS)
        _check("light_end", self.light_end, LIGHTS)
        _check("camera", self.camera, CAMERAS)
        if len(self.layout) != NUM_LAYOUT_NUMBERS:
            raise ValueError(f"layout has {len(self.layout)} numbers, not {NUM_LAYOUT_NUMBERS}")


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: must be one of {', '.join(choices)}")


def is_held_out_actor(actor: Actor) -> bool:
    """One (subject, color, motion) in eight: any two of the three still occur together in training.

    3 and 5 have inverses mod 8, so each pair of subject with color leaves out exactly one motion, each pair of
    subject with motion exactly one color, and each pair of color with motion at most one subject.
    """
    i_subject, i_color, i_motion = (
        SUBJECTS.index(actor.subject),
        COLORS.index(actor.color),
        MOTIONS.index(actor.motion),
    )
    return (i_subject + 3 * i_color + 5 * i_motion) % 8 == 0


def is_held_out_place(actor: Actor, surroundings: str, light: str) -> bool:
    """One (subject, surroundings, light) in six, each pair of them kept in training."""
    i_place = SURROUNDINGS.index(surroundings) + 2 * LIGHTS.index(light)
    return (SUBJECTS.index(actor.subject) + i_place) % 6 == 0


def is_held_out(scene: Scene) -> bool:
    """Whether any combination in the scene is left out of training."""
    return any(
        is_held_out_actor(actor) or is_held_out_place(actor, scene.surroundings, scene.light) for actor in scene.actors
    )


def sample_scene(
    generator: random.Random,
    *,
    held_out: bool = False,
    num_actors: int | None = None,
    two_actors: float = 0.2,
    camera: str | None = None,
    changing_light: float = 0.0,
    motions: Sequence[str] = MOTIONS,
) -> Scene:
    """Draws a scene.

    Args:
        generator: source of all randomness.
        held_out: False draws scenes of training, which contain no held-out combination; True draws scenes each of
            whose actors is held out, the first one in a held-out place.
        num_actors: 1 or 2; by default drawn.
        two_actors: share of scenes with two, if their number is drawn.
        camera: by default static in half of the scenes.
        changing_light: share of scenes in which the light changes.
        motions: each actor's is one of these; what stands there twice is drawn twice as often.
    """
    accepted: Callable[[Scene], bool] = _tests_generalisation if held_out else _is_for_training
    if num_actors is None:  # once: scenes of two are accepted less often
        num_actors = 1 + (generator.random() < two_actors)
    while True:
        scene = _draw(generator, num_actors, camera, changing_light, motions)
        if accepted(scene):
            return scene


def _tests_generalisation(scene: Scene) -> bool:
    return is_held_out_place(scene.actors[0], scene.surroundings, scene.light) and all(
        is_held_out_actor(actor) for actor in scene.actors
    )


def _is_for_training(scene: Scene) -> bool:
    return not is_held_out(scene)


def _draw(
    generator: random.Random, num_actors: int, camera: str | None, changing_light: float, motions: Sequence[str]
) -> Scene:
    subjects = generator.sample(SUBJECTS, num_actors)
    colors = generator.sample(COLORS, num_actors)
    light = generator.choice(LIGHTS)
    light_end = light
    if generator.random() < changing_light:
        light_end = generator.choice([other for other in LIGHTS if other != light])
    if camera is None:
        camera = "static" if generator.random() < 0.5 else generator.choice(CAMERAS[1:])
    return Scene(
        actors=tuple(
            Actor(
                subject=subject,
                color=color,
                motion=generator.choice(motions),
                size=generator.uniform(0.9, 1.12),
                offset=(generator.uniform(-1, 1), generator.uniform(-1, 1)),
                phase=generator.random(),
            )
            for subject, color in zip(subjects, colors, strict=True)
        ),
        surroundings=generator.choice(SURROUNDINGS),
        light=light,
        light_end=light_end,
        camera=camera,
        layout=tuple(generator.random() for _ in range(NUM_LAYOUT_NUMBERS)),
    )
