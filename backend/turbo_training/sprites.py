"""Subjects as signed distances, so that edges are smooth at any size and angle.

Local coordinates (u, v): origin at the subject's middle, v downwards, 1 the subject's radius. A distance is negative
inside. The shapes follow the well-known exact or bounding distances of boxes, segments and polygons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: RGB in [0, 1] of each colour of `scene.COLORS`, in the same order.
COLOR_VALUES = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (1.00, 0.88, 0.10),
    "green": (0.10, 0.78, 0.20),
    "blue": (0.10, 0.38, 0.98),
    "purple": (0.55, 0.15, 0.85),
    "pink": (1.00, 0.42, 0.72),
    "white": (0.96, 0.96, 0.97),
}


@dataclass(frozen=True, slots=True)
class Sprite:
    """A subject's outline and what is painted inside it.

    Attributes:
        body: signed distance of the whole figure.
        tint: distance of parts in a lighter tone of the subject's colour, or None.
        white, dark: distances of light and dark details, or None.
    """

    body: Tensor
    tint: Tensor | None = None
    white: Tensor | None = None
    dark: Tensor | None = None


def _disc(u: Tensor, v: Tensor, cx: float, cy: float, radius: float) -> Tensor:
    return torch.hypot(u - cx, v - cy) - radius


def _box(u: Tensor, v: Tensor, cx: float, cy: float, half_u: float, half_v: float, corner: float = 0.0) -> Tensor:
    du = (u - cx).abs() - (half_u - corner)
    dv = (v - cy).abs() - (half_v - corner)
    outside = torch.hypot(du.clamp_min(0), dv.clamp_min(0))
    return outside + torch.maximum(du, dv).clamp_max(0) - corner


def _polygon(u: Tensor, v: Tensor, *corners: tuple[float, float]) -> Tensor:
    """A convex polygon, corners clockwise on the screen; exact inside, a lower bound beyond its corners."""
    distance: Tensor | None = None
    for (u0, v0), (u1, v1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = math.hypot(u1 - u0, v1 - v0)
        normal_u, normal_v = (v1 - v0) / length, -(u1 - u0) / length
        side = (u - u0) * normal_u + (v - v0) * normal_v
        distance = side if distance is None else torch.maximum(distance, side)
    assert distance is not None
    return distance


def _circle(u: Tensor, v: Tensor) -> Sprite:
    body = _disc(u, v, 0, 0, 0.95)
    # An off-centre stripe and a spot show how the ball turns.
    stripe = torch.maximum((v - 0.18).abs() - 0.15, body + 0.14)
    return Sprite(body, tint=torch.minimum(stripe, _disc(u, v, -0.05, -0.5, 0.17)))


def _square(u: Tensor, v: Tensor) -> Sprite:
    return Sprite(_box(u, v, 0, 0, 0.84, 0.84, 0.10), tint=_box(u, v, -0.36, -0.36, 0.26, 0.26, 0.05))


def _triangle(u: Tensor, v: Tensor) -> Sprite:
    body = _polygon(u, v, (0.0, -1.02), (0.98, 0.74), (-0.98, 0.74)) - 0.04
    return Sprite(body, tint=_disc(u, v, 0.0, -0.28, 0.17))


def _star(u: Tensor, v: Tensor) -> Sprite:
    angle = torch.atan2(u, -v)  # 0 at the upper tip
    sector = 2 * math.pi / 5
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(u, v)
    along, across = radius * folded.cos(), radius * folded.sin()
    outer, inner = 1.08, 0.50
    valley_x, valley_y = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    length = math.hypot(outer - valley_x, valley_y)
    # Side of the line from tip to valley.
    body = ((along - outer) * valley_y + across * (outer - valley_x)) / length - 0.03
    return Sprite(body, tint=_disc(u, v, 0.0, -0.42, 0.16))


def _cat(u: Tensor, v: Tensor) -> Sprite:
    head = (torch.hypot(u / 0.98, (v - 0.16) / 0.80) - 1) * 0.80
    mirrored = u.abs()
    ear = _polygon(mirrored, v, (0.30, -0.45), (0.86, -1.05), (0.93, 0.02)) - 0.03
    inner_ear = _polygon(mirrored, v, (0.50, -0.52), (0.78, -0.82), (0.82, -0.28))
    eye = (torch.hypot((mirrored - 0.40) / 0.20, (v - 0.04) / 0.23) - 1) * 0.20
    pupil = (torch.hypot((mirrored - 0.40) / 0.10, (v - 0.04) / 0.19) - 1) * 0.10
    nose = _polygon(mirrored, v, (-0.2, 0.34), (0.13, 0.34), (0.0, 0.48))
    whiskers = torch.minimum(
        _box(mirrored, v - 0.08 * mirrored, 0.82, 0.42, 0.20, 0.028),
        _box(mirrored, v + 0.10 * mirrored, 0.82, 0.42, 0.20, 0.028),
    )
    dark = torch.minimum(torch.minimum(pupil, nose), whiskers)
    return Sprite(torch.minimum(head, ear), tint=inner_ear, white=eye, dark=dark)


def _car(u: Tensor, v: Tensor) -> Sprite:
    hull = _box(u, v, 0.0, 0.16, 1.10, 0.30, 0.14)
    cabin = _polygon(u, v, (-0.52, -0.58), (0.30, -0.58), (0.68, -0.02), (-0.76, -0.02)) - 0.04
    wheels = torch.minimum(_disc(u, v, -0.58, 0.46, 0.27), _disc(u, v, 0.58, 0.46, 0.27))
    hubs = torch.minimum(_disc(u, v, -0.58, 0.46, 0.11), _disc(u, v, 0.58, 0.46, 0.11))
    windows = torch.minimum(
        _polygon(u, v, (-0.48, -0.48), (-0.12, -0.48), (-0.12, -0.10), (-0.66, -0.10)),
        _polygon(u, v, (0.02, -0.48), (0.26, -0.48), (0.52, -0.10), (0.02, -0.10)),
    )
    lamp = _disc(u, v, 0.98, 0.10, 0.09)
    body = torch.minimum(torch.minimum(hull, cabin), wheels)
    return Sprite(body, white=torch.minimum(torch.minimum(windows, lamp), hubs), dark=wheels.maximum(-hubs))


#: Signed distances of each subject.
SPRITES: dict[str, Callable[[Tensor, Tensor], Sprite]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cat": _cat,
    "car": _car,
}
#: The farthest that any subject reaches from its middle, in radii.
REACH = 1.3
