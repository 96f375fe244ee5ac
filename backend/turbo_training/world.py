"""The procedural world: scenes to clips, whole batches at a time, on any device.

A clip is its surroundings (a still picture seen by a moving camera) with one or two subjects drawn over them along
their paths. Surroundings are painted once a scene and resampled for each frame; a subject is computed from its signed
distance, in a window around it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo_training.backgrounds import MARGIN, paint_surroundings
from turbo_training.scene import LIGHTS, SURROUNDINGS, Actor, Scene
from turbo_training.sprites import COLOR_VALUES, REACH, SPRITES

#: Radius of a subject of size 1 as a share of half the frame's shorter side: alone, and beside another.
_RADIUS_ALONE, _RADIUS_PAIR = 0.33, 0.28
#: The camera's way over a clip: shares of the frame's half width, and of its scale.
PAN_TRAVEL, ZOOM_TRAVEL = 0.40, 1.35
_GLOW_PIXELS = 9.0
#: Of a pixel's light, the share that a lens leaves in it, and that it spreads to each neighbour in a row, then in a
#: column: without it edges are finer than what one latent for 8x8 pixels can hold.
_SHARP, _SPREAD = 0.6, 0.2


def render(
    scenes: Sequence[Scene],
    *,
    num_frames: int = 33,
    height: int = 144,
    width: int = 256,
    device: torch.device | str = "cpu",
    at_once: int | None = None,
) -> Tensor:
    """Renders scenes to clips.

    Args:
        scenes: what to show.
        num_frames: 2 or more; a motion takes the whole clip, however long.
        height, width: pixels.
        at_once: scenes computed together; by default what suits the device's memory.

    Returns:
        uint8 RGB [B, F, H, W, 3] on `device`.
    """
    if num_frames < 2:
        raise ValueError(f"num_frames is {num_frames}: a motion needs at least 2")
    device = torch.device(device)
    at_once = at_once or (256 if device.type == "cuda" else 4)
    clips = torch.empty(len(scenes), num_frames, height, width, 3, dtype=torch.uint8, device=device)
    for begin in range(0, len(scenes), at_once):
        batch = scenes[begin : begin + at_once]
        frames_NFCHW = _render_surroundings(batch, num_frames, height, width, device)
        for slot in range(2):
            present = [i for i, scene in enumerate(batch) if len(scene.actors) > slot]
            for subject in SPRITES:
                chosen = [i for i in present if batch[i].actors[slot].subject == subject]
                if chosen:
                    _draw_subject(frames_NFCHW, [batch[i] for i in chosen], slot, torch.tensor(chosen, device=device))
        frames_NFCHW = _through_lens(_through_lens(frames_NFCHW, -1), -2)
        clips[begin : begin + len(batch)] = (frames_NFCHW * 255 + 0.5).clamp_(0, 255).byte().permute(0, 1, 3, 4, 2)
    return clips


def _through_lens(frames: Tensor, dim: int) -> Tensor:
    """Each pixel and its two neighbours along a dimension, of which those at the border have themselves as one."""
    size = frames.shape[dim]
    before = torch.cat((frames.narrow(dim, 0, 1), frames.narrow(dim, 0, size - 1)), dim)
    after = torch.cat((frames.narrow(dim, 1, size - 1), frames.narrow(dim, size - 1, 1)), dim)
    return frames.mul(_SHARP).add_(before, alpha=_SPREAD).add_(after, alpha=_SPREAD)


def subject_paths(
    scenes: Sequence[Scene], slot: int, *, num_frames: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the actors of one slot are: middle [N, F, 2] (x, y) in pixels, radius [N, F] in pixels, angle [N, F].

    Angles are radians, clockwise on the screen. On the CPU, float32.
    """
    u = torch.arange(num_frames, dtype=torch.float32) / (num_frames - 1)
    side = min(height, width) / 2
    middles, radii, angles = [], [], []
    for scene in scenes:
        actor = scene.actors[slot]
        is_pair = len(scene.actors) == 2
        radius = side * (_RADIUS_PAIR if is_pair else _RADIUS_ALONE) * actor.size
        wide = width >= height
        # Half the room for the subject's middle, and where that room lies.
        room_x = width / (4 if is_pair and wide else 2) - 1.12 * radius
        room_y = height / (4 if is_pair and not wide else 2) - 1.15 * radius
        shift = (-1, 1)[slot] * 0.25 if is_pair else 0.0
        x = torch.full_like(u, width * (0.5 + (shift if wide else 0.0)))
        y = torch.full_like(u, height * (0.5 + (0.0 if wide else shift)))
        dx, dy, scale, angle = _move(actor, u, room_x, room_y)
        middles.append(torch.stack((x + dx, y + dy), dim=-1))
        radii.append(radius * scale)
        angles.append(angle)
    return torch.stack(middles), torch.stack(radii), torch.stack(angles)


def _move(actor: Actor, u: Tensor, room_x: float, room_y: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Displacement in pixels, scale and angle over normalised time."""
    still = torch.zeros_like(u)
    dx = still + 0.30 * actor.offset[0] * room_x
    dy = still + 0.25 * actor.offset[1] * room_y
    scale, angle = torch.ones_like(u), still
    swing = 2 * u - 1
    reach_x, reach_y = min(room_x, 1.6 * room_y + 20), room_y
    if actor.motion in ("left", "right"):
        sign = -1 if actor.motion == "left" else 1
        dx = sign * swing * reach_x * 0.88 + 0.12 * actor.offset[0] * reach_x
    elif actor.motion in ("up", "down"):
        sign = -1 if actor.motion == "up" else 1
        dy = sign * swing * reach_y * 0.92 + 0.08 * actor.offset[1] * reach_y
    elif actor.motion == "bounce":
        hop = (torch.sin(2 * math.pi * u)).abs()
        dy = reach_y * (0.85 - 1.45 * hop)
    elif actor.motion == "circle":
        orbit = 0.85 * min(room_x, room_y)
        turn = 2 * math.pi * (u + actor.phase)
        dx = dx * 0.5 + orbit * turn.cos()
        dy = orbit * turn.sin()
    elif actor.motion == "grow":
        scale = 0.45 + 0.80 * u
    elif actor.motion == "spin":
        angle = 2 * math.pi * u
    return dx, dy, scale, angle


def camera_path(scene: Scene, num_frames: int) -> Tensor:
    """The camera [F, 2]: displacement to the right in half widths of the frame, and magnification."""
    u = torch.arange(num_frames, dtype=torch.float32) / (num_frames - 1)
    offset, scale = torch.zeros_like(u), torch.ones_like(u)
    if scene.camera in ("pan_left", "pan_right"):
        sign = -1 if scene.camera == "pan_left" else 1
        offset = sign * (u - 0.5) * PAN_TRAVEL
    elif scene.camera in ("zoom_in", "zoom_out"):
        scale = ZOOM_TRAVEL ** (u if scene.camera == "zoom_in" else 1 - u)
    return torch.stack((offset, scale), dim=-1)


def _render_surroundings(
    scenes: Sequence[Scene], num_frames: int, height: int, width: int, device: torch.device
) -> Tensor:
    """float32 [N, F, 3, H, W] in [0, 1]."""
    places = torch.tensor([SURROUNDINGS.index(scene.surroundings) for scene in scenes], device=device)
    begins = torch.tensor([LIGHTS.index(scene.light) for scene in scenes], device=device)
    ends = torch.tensor([LIGHTS.index(scene.light_end) for scene in scenes], device=device)
    layouts = torch.tensor([scene.layout for scene in scenes], device=device)
    pictures = paint_surroundings(places, begins, layouts, height=height, width=width)
    grid = _camera_grid(scenes, num_frames, height, width, device)
    frames = _look(pictures, grid)
    changing = (begins != ends).nonzero()[:, 0]
    if len(changing):
        later = paint_surroundings(places[changing], ends[changing], layouts[changing], height=height, width=width)
        u = torch.linspace(0, 1, num_frames, device=device)
        blend = ((u - 0.15) / 0.7).clamp(0, 1)[:, None, None, None]
        frames[changing] = torch.lerp(frames[changing], _look(later, grid[changing]), blend)
    return frames


def _camera_grid(scenes: Sequence[Scene], num_frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Where each pixel looks in the picture: [N, F, H, W, 2] in [-1, 1]."""
    cameras = torch.stack([camera_path(scene, num_frames) for scene in scenes]).to(device)
    offset, scale = cameras[..., 0, None, None], cameras[..., 1, None, None]
    y = ((torch.arange(height, device=device) + 0.5) / height * 2 - 1)[:, None]
    x = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1)[None]
    grid_x = (x / scale + offset) / MARGIN
    grid_y = (y / scale) / MARGIN
    return torch.stack(torch.broadcast_tensors(grid_x, grid_y), dim=-1)


def _look(pictures: Tensor, grid: Tensor) -> Tensor:
    """[N, 3, h, w] through [N, F, H, W, 2] to [N, F, 3, H, W]."""
    N, num_frames, height, width, _ = grid.shape
    seen = F.grid_sample(pictures, grid.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=False)
    return seen.view(N, 3, num_frames, height, width).transpose(1, 2).contiguous()


def render_labels(
    scenes: Sequence[Scene],
    *,
    num_frames: int,
    height: int,
    width: int,
    label_height: int,
    label_width: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which subject each place shows: uint8 [B, F, label_height, label_width], 0 for none, else 1 + its index.

    Args:
        height, width: of the clip that `render` would give.
        label_height, label_width: of the labels, which span the same frame.
    """
    labels = torch.zeros(len(scenes), num_frames, label_height, label_width, dtype=torch.uint8, device=device)
    x = (torch.arange(label_width, device=device) + 0.5) * (width / label_width)
    y = (torch.arange(label_height, device=device) + 0.5) * (height / label_height)
    for slot in range(2):
        for i_subject, subject in enumerate(SPRITES):
            chosen = [i for i, s in enumerate(scenes) if len(s.actors) > slot and s.actors[slot].subject == subject]
            if not chosen:
                continue
            shown = [scenes[i] for i in chosen]
            middle, radius, angle = (
                path.to(device)
                for path in subject_paths(shown, slot, num_frames=num_frames, height=height, width=width)
            )
            px = (x - middle[..., 0, None])[..., None, :]
            py = (y - middle[..., 1, None])[..., :, None]
            u, v = _local(px, py, radius, angle, [scene.actors[slot] for scene in shown])
            inside = SPRITES[subject](u, v).body < 0.05
            labels[chosen] = torch.where(inside, torch.full_like(labels[chosen], 1 + i_subject), labels[chosen])
    return labels


def _local(px: Tensor, py: Tensor, radius: Tensor, angle: Tensor, actors: Sequence[Actor]) -> tuple[Tensor, Tensor]:
    """Offsets from the middle in pixels, [n, F, 1, w] and [n, F, h, 1], in the subject's own coordinates."""
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    # A car looks where it goes.
    facing = px.new_tensor(
        [-1.0 if actor.subject == "car" and actor.motion == "left" else 1.0 for actor in actors]
    ).view(-1, 1, 1, 1)
    scale = radius[..., None, None]
    return (px * cos + py * sin) / scale * facing, (py * cos - px * sin) / scale


def _draw_subject(frames: Tensor, scenes: Sequence[Scene], slot: int, rows: Tensor) -> None:
    """Draws one kind of subject into the frames [N, F, 3, H, W] of the scenes at `rows`, in place."""
    _, num_frames, _, height, width = frames.shape
    device = frames.device
    paths = subject_paths(scenes, slot, num_frames=num_frames, height=height, width=width)
    middle, radius, angle = (path.to(device) for path in paths)
    actors = [scene.actors[slot] for scene in scenes]
    reach = REACH * float(paths[1].max()) + _GLOW_PIXELS
    size = min(2 * math.ceil(reach), min(height, width))

    corner = (middle - size / 2).round().long()
    corner_x = corner[..., 0].clamp(0, width - size)
    corner_y = corner[..., 1].clamp(0, height - size)
    steps = torch.arange(size, device=device)
    pixel_x = corner_x[..., None] + steps  # [n, F, S]
    pixel_y = corner_y[..., None] + steps
    px = (pixel_x + 0.5 - middle[..., 0, None])[..., None, :]
    py = (pixel_y + 0.5 - middle[..., 1, None])[..., :, None]
    scale = radius[..., None, None]
    sprite = SPRITES[actors[0].subject](*_local(px, py, radius, angle, actors))

    color = torch.tensor([COLOR_VALUES[actor.color] for actor in actors], device=device).view(-1, 1, 1, 1, 3)
    color = color * _lightness(scenes, num_frames, device)
    is_neon, is_day = (_light_share(scenes, light, num_frames, device) for light in ("neon", "day"))

    index = (rows[:, None, None, None], torch.arange(num_frames, device=device)[None, :, None, None])
    place = (*index, slice(None), pixel_y[..., :, None], pixel_x[..., None, :])
    window = frames[place]  # advanced indices around a slice: [n, F, S, S, 3]

    distance = sprite.body * scale  # in pixels, negative inside
    shadow = (1 - torch.hypot(px / (1.1 * scale), (py - 1.08 * scale) / (0.22 * scale))).clamp(0, 1)
    window = window * (1 - 0.45 * (shadow * is_day)[..., None])
    # Bounds of distances run far ahead beyond sharp corners: the glow ends where the window does.
    glow_distance = torch.maximum(distance, torch.hypot(px, py) - REACH * scale).clamp_min(0)
    glow = (1 - glow_distance / _GLOW_PIXELS).clamp(0, 1).square() * 0.75 * is_neon
    window = torch.lerp(window, color.expand_as(window), glow[..., None])

    def paint(onto: Tensor, part: Tensor, tone: Tensor) -> Tensor:
        cover = (0.5 - part * scale).clamp(0, 1)[..., None]
        return torch.lerp(onto, tone.expand_as(onto), cover)

    rim = 0.055
    dark = color * 0.22
    window = paint(window, sprite.body - rim, torch.lerp(dark, color.new_ones(3), 0.9 * is_neon[..., None]))
    body = color * (1.06 - 0.16 * (py / scale))[..., None].clamp(0.85, 1.12)
    window = paint(window, sprite.body + rim, body.clamp(0, 1))
    if sprite.tint is not None:
        # A lighter tone, and a darker one of white, which has no lighter.
        is_white = torch.tensor([actor.color == "white" for actor in actors], device=device).view(-1, 1, 1, 1, 1)
        window = paint(
            window, sprite.tint, torch.where(is_white, color * 0.78, torch.lerp(color, color.new_ones(3), 0.5))
        )
    if sprite.white is not None:
        window = paint(window, sprite.white, torch.lerp(color, color.new_tensor((0.93, 0.96, 1.0)), 0.88))
    if sprite.dark is not None:
        window = paint(window, sprite.dark, color.new_full((3,), 0.10))
    frames[place] = window


def _light_share(scenes: Sequence[Scene], light: str, num_frames: int, device: torch.device) -> Tensor:
    """How far each frame is in that light, [n, F, 1, 1] in [0, 1]."""
    u = torch.linspace(0, 1, num_frames)
    blend = ((u - 0.15) / 0.7).clamp(0, 1)
    shares = [(scene.light == light) * (1 - blend) + (scene.light_end == light) * blend for scene in scenes]
    return torch.stack(shares).to(device)[..., None, None]


def _lightness(scenes: Sequence[Scene], num_frames: int, device: torch.device) -> Tensor:
    """How bright subjects are: a little less by night; [n, F, 1, 1, 1]."""
    return (1 - 0.1 * _light_share(scenes, "night", num_frames, device))[..., None]
