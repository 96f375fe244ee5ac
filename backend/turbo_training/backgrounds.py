"""Surroundings: a still picture a scene, larger than the frame, through which the camera then moves.

Coordinates (x, y): y is -1 at the top of the frame and 1 at its bottom, x likewise scaled, so the frame spans
|x| <= width / height. A picture is a sky and layers from back to front, each a signed distance with a colour; the light
decides how they are painted: in full colour (day), dark and blue (night), or near black with glowing edges (neon).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_training.scene import LIGHTS, SURROUNDINGS

#: The picture covers this many times the frame on each side, room for the camera to pan and zoom.
MARGIN = 1.3
RGB = tuple[float, float, float]

_CYAN: RGB = (0.10, 0.95, 1.00)
_MAGENTA: RGB = (1.00, 0.15, 0.80)
_LIME: RGB = (0.45, 1.00, 0.35)
_AMBER: RGB = (1.00, 0.65, 0.15)


@dataclass(frozen=True, slots=True)
class _Layer:
    """distance [N, h, w]; `shade` brightens or darkens the day colour; lamps glow by night."""

    distance: Tensor
    color: RGB
    neon: RGB
    shade: Tensor | None = None
    is_lamp: bool = False


_Layers = Callable[[Tensor, Tensor, Tensor], list[_Layer]]


def paint_surroundings(
    surroundings: Tensor, lights: Tensor, layouts: Tensor, *, height: int, width: int, scale: float = 1.2
) -> Tensor:
    """Paints one picture a scene.

    Args:
        surroundings, lights: int64 [N], indices into `SURROUNDINGS` and `LIGHTS`.
        layouts: float32 [N, NUM_LAYOUT_NUMBERS].
        height, width: of the frame, in pixels.
        scale: pixels of the picture to one of the frame.

    Returns:
        float32 [N, 3, h, w] in [0, 1], h = height * MARGIN * scale.
    """
    device = layouts.device
    rows, columns = round(height * MARGIN * scale), round(width * MARGIN * scale)
    y = (torch.arange(rows, device=device) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns, device=device) + 0.5) / columns * 2 - 1
    y, x = torch.meshgrid(y * MARGIN, x * MARGIN * width / height, indexing="ij")
    pictures = layouts.new_empty(len(layouts), 3, rows, columns)
    for i_place, place in enumerate(SURROUNDINGS):
        for i_light, light in enumerate(LIGHTS):
            chosen = ((surroundings == i_place) & (lights == i_light)).nonzero()[:, 0]
            if len(chosen):
                layout = layouts[chosen].T[:, :, None, None]
                layers = _PLACES[place](x[None], y[None], layout)
                pixel = 2 * MARGIN / rows
                pictures[chosen] = _compose(light, place, layers, x[None], y[None], layout, pixel)
    return pictures.clamp_(0, 1)


def _compose(
    light: str, place: str, layers: list[_Layer], x: Tensor, y: Tensor, layout: Tensor, pixel: float
) -> Tensor:
    picture = _sky(light, place, x, y, layout, pixel)
    for layer in layers:
        cover = (0.5 - layer.distance / pixel).clamp(0, 1)[:, None]
        color = _rgb(layer.color, picture)
        if layer.shade is not None:
            color = color * layer.shade[:, None]
        if light == "night":
            color = _rgb((1.0, 0.86, 0.45), picture) if layer.is_lamp else color * _rgb((0.26, 0.32, 0.50), picture)
        elif light == "neon":
            color = _rgb(layer.neon, picture) if layer.is_lamp else color * _rgb((0.10, 0.05, 0.16), picture) + 0.015
        picture = picture + cover * (color - picture)
        if light == "neon" and not layer.is_lamp:
            edge = layer.distance.abs()[:, None]
            line = (1.3 - edge / (1.2 * pixel)).clamp(0, 1)
            glow = 0.55 * torch.exp(-edge / 0.055)
            picture = picture + torch.maximum(line, glow) * (_rgb(layer.neon, picture) - picture)
    return picture


def _sky(light: str, place: str, x: Tensor, y: Tensor, layout: Tensor, pixel: float) -> Tensor:
    low = ((y + 1.1) / 1.6).clamp(0, 1)[:, None]
    top, bottom = _SKIES[light][0], _SKIES[light][1]
    if light == "day":
        bottom = _DAY_HORIZONS[place]
    picture = _rgb(top, low) + low * (_rgb(bottom, low) - _rgb(top, low))
    picture = picture.expand(layout.shape[1], -1, -1, -1)
    # The disc stands where no subject's usual path hides it for long.
    disc_x = (layout[0] * 2 - 1) * 1.1
    distance = torch.hypot(x - disc_x, y + 0.66) - (0.17 if light != "neon" else 0.30)
    if light == "neon":
        # The setting sun of a synthwave poster: amber above, magenta below, with slits.
        local = ((y + 0.66) / 0.30).clamp(-1, 1)
        slits = (torch.remainder(local * 3.2, 1.0) - 0.24 - 0.1 * local) / 3.2 * 0.30
        distance = torch.where(local > -0.1, torch.maximum(distance, -slits), distance)
        blend = (local * 0.5 + 0.5)[:, None]
        color = _rgb(_AMBER, picture) + blend * (_rgb(_MAGENTA, picture) - _rgb(_AMBER, picture))
    else:
        color = _rgb((1.0, 0.95, 0.62) if light == "day" else (0.93, 0.94, 0.86), picture)
        halo = torch.exp(-distance.clamp_min(0) / 0.12)[:, None] * (0.35 if light == "day" else 0.28)
        picture = picture + halo * (color - picture)
    if light == "night":
        # A crescent: the disc less another one.
        distance = torch.maximum(distance, 0.15 - torch.hypot(x - disc_x + 0.09, y + 0.70))
        picture = picture + _stars(x, y, layout)[:, None] * (1 - picture)
    cover = (0.5 - distance / pixel).clamp(0, 1)[:, None]
    return picture + cover * (color - picture)


def _stars(x: Tensor, y: Tensor, layout: Tensor) -> Tensor:
    """One star in some cells of a grid, at a place of its own."""
    cell = 0.28
    column, row = torch.floor(x / cell), torch.floor(y / cell)
    wherex = _hash(column + 31.0 * row + 7.0 * layout[1])
    wherey = _hash(column * 1.7 + 17.0 * row + 3.0 * layout[2] + 5.0)
    bright = _hash(column * 2.3 + 11.0 * row + layout[1] + 9.0)
    du = x / cell - column - 0.2 - 0.6 * wherex
    dv = y / cell - row - 0.2 - 0.6 * wherey
    return torch.exp(-(du.square() + dv.square()) / 0.006) * (bright > 0.45) * 0.9


def _hash(value: Tensor) -> Tensor:
    """A number in [0, 1) that looks random, the same for equal inputs."""
    return torch.frac(torch.frac(value * 0.6180339 + 0.137).add(1.0).square() * 43.758)


def _rgb(color: RGB, like: Tensor) -> Tensor:
    return like.new_tensor(color).view(1, 3, 1, 1)


def _wave(x: Tensor, *parts: tuple[float, float, Tensor]) -> Tensor:
    """Sum of a sin(k x + phase) over (a, k, phase in turns)."""
    total = torch.zeros_like(x)
    for amplitude, frequency, phase in parts:
        total = total + amplitude * torch.sin(frequency * x + 2 * math.pi * phase)
    return total


def _box(x: Tensor, y: Tensor, half_x: float | Tensor, half_y: float | Tensor) -> Tensor:
    return torch.maximum(x.abs() - half_x, y.abs() - half_y)


def _meadow(x: Tensor, y: Tensor, r: Tensor) -> list[_Layer]:
    far = 0.10 + _wave(x, (0.16, 1.5, r[1]), (0.05, 3.4, r[2]))
    near = 0.46 + _wave(x, (0.09, 1.1, r[3]), (0.03, 4.0, r[4]))
    cell = 0.34
    column, row = torch.floor(x / cell), torch.floor((y - near) / cell)
    du = x - (column + 0.25 + 0.5 * _hash(column + 13.0 * row + r[5])) * cell
    dv = y - near - (row + 0.35 + 0.3 * _hash(column * 1.3 + 7.0 * row)) * cell
    flowers = torch.maximum(torch.hypot(du, dv) - 0.032, near + 0.08 - y)
    return [
        _Layer((far - y) * 0.9, (0.55, 0.74, 0.42), _LIME, 1.0 - 0.18 * (y - far).clamp(0, 1)),
        _Layer((near - y) * 0.95, (0.42, 0.62, 0.30), _LIME, 1.05 - 0.25 * (y - near).clamp(0, 1)),
        _Layer(flowers, (0.97, 0.95, 0.86), (0.75, 1.0, 0.7), is_lamp=True),
    ]


def _beach(x: Tensor, y: Tensor, r: Tensor) -> list[_Layer]:
    horizon = -0.02 + 0.10 * (r[1] - 0.5)
    shore = 0.56 + 0.10 * (r[2] - 0.5) + _wave(x, (0.05, 1.6, r[3]), (0.02, 4.1, r[4]))
    depth = ((y - horizon) / 0.6).clamp(0, 1)
    waves = torch.sin((y - horizon) * 30 / (0.6 + 0.8 * depth) + 0.5 * torch.sin(3 * x + 6 * r[5]))
    crests = 0.55 - waves  # inside only around the crests
    crests = torch.maximum(crests * 0.02, torch.maximum(horizon + 0.05 - y, y - shore + 0.06))
    return [
        _Layer(horizon - y, (0.32, 0.63, 0.76), _CYAN, 1.0 - 0.12 * depth),
        _Layer(crests, (0.60, 0.82, 0.88), _CYAN),
        _Layer(shore - 0.045 - y, (0.95, 0.97, 0.97), _CYAN),
        _Layer(shore - y, (0.93, 0.84, 0.64), _AMBER, 1.0 - 0.12 * (y - shore).clamp(0, 1)),
    ]


def _city(x: Tensor, y: Tensor, r: Tensor) -> list[_Layer]:
    layers = []
    for depth, (cell, low, high, color, neon) in enumerate(
        ((0.36, -0.42, 0.50, (0.66, 0.70, 0.78), _MAGENTA), (0.52, -0.12, 0.52, (0.50, 0.53, 0.62), _CYAN))
    ):
        shifted = x + cell * r[1 + depth]
        column = torch.floor(shifted / cell)
        roof = low + (high - 0.30) * _hash(column * 3.1 + 5.0 * r[3] + 2.0 * depth)
        local = shifted - (column + 0.5) * cell
        houses = torch.maximum(local.abs() - 0.44 * cell, roof - y)
        layers.append(_Layer(houses, color, neon, 1.0 - 0.1 * (y - roof).clamp(0, 1)))
        pitch_x, pitch_y = cell / 4, 0.15
        window_x = torch.remainder(local + cell / 2, pitch_x) - pitch_x / 2
        window_y = torch.remainder(y - roof, pitch_y) - pitch_y / 2
        window_id = torch.floor((local + cell / 2) / pitch_x) + 5 * column + 19 * torch.floor((y - roof) / pitch_y)
        panes = _box(window_x, window_y, 0.028, 0.040)
        panes = torch.maximum(panes, torch.maximum(houses + 0.05, 0.42 - _hash(window_id + 3 * r[4])))
        layers.append(_Layer(panes, (0.80, 0.86, 0.93), neon, is_lamp=True))
    street = 0.56
    dashes = _box(torch.remainder(x + r[5], 0.6) - 0.3, y - 0.86, 0.16, 0.022)
    return [
        *layers,
        _Layer(street - y, (0.44, 0.45, 0.49), _MAGENTA, 1.0 + 0.1 * (y - street).clamp(0, 1)),
        _Layer(street + 0.10 - y, (0.36, 0.37, 0.41), _MAGENTA),
        _Layer(dashes, (0.92, 0.91, 0.84), _AMBER),
    ]


def _mountains(x: Tensor, y: Tensor, r: Tensor) -> list[_Layer]:
    def peaks(cell: float, base: float, height: float, key: Tensor) -> tuple[Tensor, Tensor]:
        """Distance of a row of peaks, and the height of each above its foot."""
        distance: Tensor | None = None
        tops: Tensor | None = None
        for neighbour in (-1.0, 0.0, 1.0):
            column = torch.floor(x / cell + key) + neighbour
            summit = base - height * (0.55 + 0.45 * _hash(column * 2.7 + 9.0 * key))
            middle = (column + 0.5 - key + 0.3 * (_hash(column * 1.9) - 0.5)) * cell
            one = (summit + 1.25 * (x - middle).abs() - y) * 0.62
            below = y - summit
            if distance is None or tops is None:
                distance, tops = one, below
            else:
                tops = torch.where(one < distance, below, tops)
                distance = torch.minimum(distance, one)
        assert distance is not None
        assert tops is not None
        return distance, tops

    far, far_below = peaks(1.15, 0.55, 1.25, r[1])
    near, near_below = peaks(0.9, 0.62, 0.75, r[2])
    jag = 0.05 * torch.sin(22 * x + 6 * r[4])
    snow = 0.60 + _wave(x, (0.06, 1.4, r[3]))
    return [
        _Layer(far, (0.52, 0.58, 0.72), _CYAN),
        _Layer(torch.maximum(far, far_below - 0.36 - jag), (0.96, 0.97, 1.0), (0.75, 0.95, 1.0)),
        _Layer(near, (0.40, 0.46, 0.60), _CYAN),
        _Layer(torch.maximum(near, near_below - 0.22 - jag), (0.95, 0.96, 1.0), (0.75, 0.95, 1.0)),
        _Layer(snow - y, (0.91, 0.94, 0.98), (0.75, 0.95, 1.0), 1.0 - 0.08 * (y - snow).clamp(0, 1)),
    ]


def _desert(x: Tensor, y: Tensor, r: Tensor) -> list[_Layer]:
    middle = (r[1] - 0.5) * 1.4
    large = torch.maximum((0.95 * (x - middle).abs() - 0.42 - y) * 0.72, y - 0.45)
    small = torch.maximum((0.95 * (x - middle - 0.95).abs() - 0.08 - y) * 0.72, y - 0.45)
    lit = x > middle
    far = 0.26 + _wave(x, (0.08, 1.3, r[2]), (0.03, 2.9, r[3]))
    near = 0.58 + _wave(x, (0.11, 1.2, r[4]), (0.03, 3.1, r[5]))
    return [
        _Layer(small, (0.80, 0.60, 0.38), _AMBER, torch.where(x > middle + 0.95, 0.82, 1.0)),
        _Layer(large, (0.84, 0.64, 0.40), _AMBER, torch.where(lit, 0.82, 1.0)),
        _Layer((far - y) * 0.95, (0.90, 0.72, 0.46), _AMBER, 1.0 - 0.2 * (y - far).clamp(0, 1)),
        _Layer((near - y) * 0.93, (0.84, 0.63, 0.38), _AMBER, 1.04 - 0.2 * (y - near).clamp(0, 1)),
    ]


def _forest(x: Tensor, y: Tensor, r: Tensor) -> list[_Layer]:
    layers = []
    rows: tuple[tuple[float, float, float, RGB, RGB], ...] = (
        (0.30, 0.40, 0.95, (0.30, 0.46, 0.42), (0.15, 0.75, 0.85)),
        (0.44, 0.62, 1.30, (0.18, 0.36, 0.28), (0.20, 1.00, 0.60)),
    )
    for depth, (cell, foot, height, color, neon) in enumerate(rows):
        distance: Tensor | None = None
        for neighbour in (-1.0, 0.0, 1.0):
            column = torch.floor(x / cell + r[1 + depth]) + neighbour
            top = foot - height * (0.62 + 0.38 * _hash(column * 2.1 + 4.0 * r[3] + depth))
            middle = (column + 0.5 - r[1 + depth]) * cell
            below = (y - top) / (foot - top)
            # Three skirts, each wider than the one above.
            tier = torch.frac((below * 3).clamp(0, 2.999))
            half_width = cell * (0.16 + 0.44 * below.clamp(0, 1) * 0.75 + 0.16 * tier - 0.16)
            tree = torch.maximum((x - middle).abs() - half_width, torch.maximum(top - y, y - foot)) * 0.9
            distance = tree if distance is None else torch.minimum(distance, tree)
        assert distance is not None
        layers.append(_Layer(distance, color, neon, 1.08 - 0.2 * (y + 0.6).clamp(0, 1)))
    ground = 0.56 + _wave(x, (0.03, 1.8, r[4]))
    layers.append(_Layer(ground - y, (0.40, 0.36, 0.24), (0.20, 1.00, 0.60), 1.0 - 0.2 * (y - ground).clamp(0, 1)))
    return layers


_PLACES: dict[str, _Layers] = {
    "meadow": _meadow,
    "beach": _beach,
    "city": _city,
    "mountains": _mountains,
    "desert": _desert,
    "forest": _forest,
}
_SKIES: dict[str, tuple[RGB, RGB]] = {
    "day": ((0.42, 0.67, 0.90), (0.86, 0.93, 0.97)),
    "night": ((0.02, 0.03, 0.10), (0.10, 0.14, 0.30)),
    "neon": ((0.05, 0.01, 0.13), (0.36, 0.05, 0.42)),
}
_DAY_HORIZONS: dict[str, RGB] = {
    "meadow": (0.86, 0.93, 0.97),
    "beach": (0.90, 0.95, 0.96),
    "city": (0.90, 0.90, 0.90),
    "mountains": (0.84, 0.90, 0.98),
    "desert": (0.97, 0.90, 0.76),
    "forest": (0.86, 0.93, 0.90),
}
