"""What a clip shows, decided from its pixels alone, to compare with what its prompt asked for.

where         a small network says of each place whether a subject covers it; of two subjects, each is looked for
              in its own half of the frame
subject       a second one classifies what is cut out there (both are trained on the procedural world alone, see
              `train_measures`)
color         the peak of the hue histogram where the subject is, or white where most of it has no hue
motion        the tracked centroid against each motion's path; of a subject that stays, its size, then its change
surroundings  linear discriminant on statistics of the rest: mean, spread and gradients of rows of the frame
light         the same statistics, from the first and from the last frames
camera        the displacement and magnification under which the rest of all frames agrees best
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from turbo_training.scene import CAMERAS, LIGHTS, MOTIONS, SUBJECTS, SURROUNDINGS
from turbo_training.world import PAN_TRAVEL, ZOOM_TRAVEL

#: Pixels a side to one place of the saliency network, and pixels of what the subject network sees.
PLACE, CUT = 4, 48
_BANDS = 9
_WEIGHTS = Path(__file__).parent / "measures.safetensors"
#: Hue in degrees of each color but white.
_HUES = {"red": 358.0, "orange": 29.0, "yellow": 52.0, "green": 129.0, "blue": 221.0, "purple": 274.0, "pink": 329.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSubject:
    """One subject: `motion` is "still" where nothing moves at all; `share` is its part of the frame's area."""

    subject: str
    color: str
    motion: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a clip shows; subjects by decreasing size, none where nothing is found."""

    subjects: tuple[MeasuredSubject, ...]
    surroundings: str
    light: str
    light_end: str
    camera: str

    def find(self, subject: str) -> MeasuredSubject | None:
        """The measured subject of that kind."""
        return next((found for found in self.subjects if found.subject == subject), None)


class SaliencyNet(nn.Module):
    """Where subjects are: frames [N, 3, H, W] in [0, 1], H and W multiples of 8, to logits [N, 1, H / 4, W / 4]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        fine, middle, deep = width, 2 * width, 3 * width
        self.stem = nn.Sequential(_conv(3, fine, stride=2), _conv(fine, middle, stride=2))
        self.down = _conv(middle, deep, stride=2)
        self.deep = nn.ModuleList(_conv(deep, deep, dilation=dilation) for dilation in (1, 2, 4))
        self.up = _conv(deep + middle, middle)
        self.out = nn.Conv2d(middle, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        fine = self.stem(frames * 2 - 1)
        coarse = self.down(fine)
        for layer in self.deep:
            coarse = coarse + layer(coarse)
        enlarged = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        return self.out(self.up(torch.cat((enlarged, fine), dim=1)))

    def find(self, frames: Tensor) -> Tensor:
        """Probabilities that a subject is there, [N, H / 2, W / 2]."""
        return F.interpolate(self(frames), scale_factor=2.0, mode="bilinear").sigmoid()[:, 0]


class SubjectNet(nn.Module):
    """What a subject is: cuts [N, 3, CUT, CUT] in [0, 1] to logits [N, subjects]."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(3, width, stride=2),
            _conv(width, 2 * width, stride=2),
            _conv(2 * width, 3 * width, stride=2),
            _conv(3 * width, 4 * width, stride=2),
            nn.Flatten(),
            nn.Linear(4 * width * (CUT // 16) ** 2, len(SUBJECTS)),
        )

    def forward(self, cuts: Tensor) -> Tensor:
        return self.layers(cuts * 2 - 1)


def cut_out(
    frames: Tensor, middle_x: Tensor, middle_y: Tensor, half_side: Tensor, angle: Tensor | None = None
) -> Tensor:
    """Squares of the frames [N, 3, H, W] around places in pixels [N], resampled to [N, 3, CUT, CUT].

    Args:
        angle: by which each square is turned, in radians [N].
    """
    _, _, height, width = frames.shape
    steps = (torch.arange(CUT, device=frames.device) + 0.5) / CUT * 2 - 1
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    angle = torch.zeros_like(half_side) if angle is None else angle
    cos, sin = (half_side * part for part in (angle.cos(), angle.sin()))
    x = middle_x[:, None, None] + cos[:, None, None] * dx - sin[:, None, None] * dy
    y = middle_y[:, None, None] + sin[:, None, None] * dx + cos[:, None, None] * dy
    grid = torch.stack((x / width * 2 - 1, y / height * 2 - 1), dim=-1)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def locate(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Middle x and y of a mask [N, h, w] in its own pixels, and its area in them; [N] each."""
    _, height, width = mask.shape
    solid = mask * (mask > 0.3)
    area = solid.sum(dim=(1, 2))
    safe = area.clamp_min(1e-3)
    x = (solid.sum(1) * (torch.arange(width, device=mask.device) + 0.5)).sum(1) / safe
    y = (solid.sum(2) * (torch.arange(height, device=mask.device) + 0.5)).sum(1) / safe
    return x, y, area


def half_side_of(area: Tensor) -> Tensor:
    """Half the side of the square that shows a subject of that area wholly, a star or a car too."""
    return 1.8 * (area / math.pi).sqrt()


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(4, out_channels), nn.SiLU())


@dataclass(frozen=True, slots=True)
class Tools:
    """The two networks, and the discriminant's weight [classes, features] and bias."""

    saliency: SaliencyNet
    subject: SubjectNet
    place_weight: Tensor
    place_bias: Tensor


@lru_cache(maxsize=1)
def load_tools(path: Path = _WEIGHTS) -> Tools:
    """The tools as shipped.

    Raises:
        FileNotFoundError: they were not made yet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: `python -m turbo_training measures` makes it")
    tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
    saliency, subject = SaliencyNet(), SubjectNet()
    for name, net in (("saliency.", saliency), ("subject.", subject)):
        net.load_state_dict({key.removeprefix(name): t for key, t in tensors.items() if key.startswith(name)})
        net.eval().requires_grad_(False)
    return Tools(saliency, subject, tensors["places.weight"], tensors["places.bias"])


def to_frames(clip: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] to float32 [F, 3, H, W] in [0, 1]."""
    return clip.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def measure(clip: Tensor, *, num_subjects: int = 1) -> Measured:
    """Measures a clip.

    Args:
        clip: uint8 RGB [F, H, W, 3], F >= 5, H and W multiples of 16.
        num_subjects: how many to look for, 1 or 2, as the prompt says.
    """
    tools = load_tools()
    frames = to_frames(clip.cpu())
    covered = tools.saliency.find(frames)  # [F, H / 2, W / 2]
    half = F.avg_pool2d(frames, 2)
    subjects = []
    for part in _parts(num_subjects, *covered.shape[1:]):
        mask = covered * part
        share = float(mask.gt(0.5).float().mean())
        if share > 5e-4:
            subject = measure_subject(tools.subject, frames, mask)
            color, motion = measure_color(half, mask), measure_motion(half, mask)
            subjects.append(MeasuredSubject(subject=subject, color=color, motion=motion, share=share))
    subjects.sort(key=lambda found: -found.share)
    background = 1 - covered[:, None]
    some = max(1, len(frames) // 6)
    begin, end = (_score_places(frames[part], background[part], tools) for part in (slice(0, some), slice(-some, None)))
    return Measured(
        subjects=tuple(subjects),
        surroundings=SURROUNDINGS[int((begin.logsumexp(1) + end.logsumexp(1)).argmax())],
        light=LIGHTS[int(begin.logsumexp(0).argmax())],
        light_end=LIGHTS[int(end.logsumexp(0).argmax())],
        camera=measure_camera(half, background),
    )


def _parts(num_subjects: int, height: int, width: int) -> list[Tensor]:
    """Where to look for each subject: everywhere, or in either half of the longer side."""
    if num_subjects == 1:
        return [torch.ones(height, width)]
    first = torch.zeros(height, width)
    if width >= height:
        first[:, : width // 2] = 1
    else:
        first[: height // 2] = 1
    return [first, 1 - first]


def measure_subject(net: SubjectNet, frames: Tensor, mask: Tensor) -> str:
    """The kind of subject that a mask [F, H / 2, W / 2] covers: mean log-probability over frames."""
    x, y, area = locate(mask)
    seen = area > 0.3 * area.median()
    scale = frames.shape[2] / mask.shape[1]
    cuts = cut_out(frames[seen], scale * x[seen], scale * y[seen], scale * half_side_of(area[seen]))
    return SUBJECTS[int(net(cuts).log_softmax(1).mean(0).argmax())]


def measure_color(frames: Tensor, mask: Tensor) -> str:
    """Frames [F, 3, h, w] in [0, 1] and a mask [F, h, w]: the name of the color."""
    pixels = frames.permute(0, 2, 3, 1)[mask > 0.6]
    if not len(pixels):
        return "none"
    high, low = pixels.amax(1), pixels.amin(1)
    spread = high - low
    saturation = spread / high.clamp_min(1e-3)
    is_lit = high > 0.3  # outlines, pupils and wheels have no hue
    has_hue = is_lit & (saturation > 0.38)
    if has_hue.sum() < 0.35 * is_lit.sum():
        return "white"
    red, green, blue = pixels[has_hue].unbind(1)
    high, spread = high[has_hue], spread[has_hue]
    sector = torch.where(
        high == red,
        (green - blue) / spread,
        torch.where(high == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    degrees = torch.remainder(sector * 60, 360)
    histogram = torch.histc(degrees, bins=120, min=0, max=360)
    kernel = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]).view(1, 1, 5)
    smooth = F.conv1d(F.pad(histogram.view(1, 1, -1), (2, 2), mode="circular"), kernel)[0, 0]
    peak = (float(smooth.argmax()) + 0.5) * 3
    return min(_HUES, key=lambda name: abs((peak - _HUES[name] + 180) % 360 - 180))


def measure_motion(frames: Tensor, mask: Tensor) -> str:
    """The motion whose path explains most of the centroid's variance; sizes and changes where it stays.

    Paths over normalised time u: a straight line in x or y (left, right, up, down), -|sin 2 pi u| in y (bounce), one
    turn (circle).
    """
    num_frames, height, width = mask.shape
    xs, ys, area = locate(mask)
    seen = area > 0.15 * area.median()
    if int(seen.sum()) < max(4, num_frames // 2):
        return "none"
    u = torch.linspace(0, 1, num_frames)[seen]
    xs, ys, area = xs[seen], ys[seen], area[seen]
    x, y = xs - xs.mean(), ys - ys.mean()
    variance = x.square().mean() + y.square().mean()
    if math.sqrt(float(variance)) > 0.045 * min(height, width):
        line, hop = u - u.mean(), -(2 * math.pi * u).sin().abs()
        hop = hop - hop.mean()
        slope_x, slope_y = (x @ line) / (line @ line), (y @ line) / (line @ line)
        turn = torch.stack((torch.cos(2 * math.pi * u), torch.sin(2 * math.pi * u)))
        turn = turn - turn.mean(1, keepdim=True)
        swung = float(_explained(x, turn) + _explained(y, turn))
        explained = {
            ("left" if slope_x < 0 else "right"): float(_explained(x, line[None])),
            ("up" if slope_y < 0 else "down"): float(_explained(y, line[None])),
            "bounce": float(_explained(y, hop[None])) if y @ hop > 0 else 0.0,
            # A turn has as much of x as of y.
            "circle": swung if min(x.var(), y.var()) > 0.2 * max(x.var(), y.var()) else 0.0,
        }
        return max(explained, key=lambda motion: explained[motion])
    size = area.sqrt().log()
    line = u - u.mean()
    if float((size @ line) / (line @ line)) > 0.35:
        return "grow"
    region = mask.amax(0) > 0.5
    lag = max(1, num_frames // 8)
    change = (frames[lag:] - frames[:-lag]).abs().mean(1)[:, region].mean()
    contrast = frames[:, :, region].std(dim=2).mean()
    return "spin" if float(change) > 0.12 * float(contrast) else "still"


def _explained(values: Tensor, paths: Tensor) -> Tensor:
    """Sum of squares of centred `values` [F] in the span of the centred `paths` [k, F]."""
    solution = torch.linalg.lstsq(paths.T, values[:, None]).solution
    return (paths.T @ solution)[:, 0].square().sum()


def place_features(frames: Tensor, background: Tensor) -> Tensor:
    """Statistics of each frame without its subjects.

    Args:
        frames: [F, 3, H, W] in [0, 1].
        background: [F, 1, H / 2, W / 2], 1 where no subject is.

    Returns:
        [F, features]: for each of 9 bands of rows the mean and spread of each channel, and the mean size of
        horizontal and vertical differences.
    """
    half = F.avg_pool2d(frames, 2)
    weight = (1 - F.max_pool2d(1 - background, 5, stride=1, padding=2)).clamp_min(0.01)

    def by_band(values: Tensor) -> Tensor:
        """Weighted means over bands: [F, C, h, w] to [F, C, bands]."""
        top = F.adaptive_avg_pool2d(values * weight, (_BANDS, 1))
        return (top / F.adaptive_avg_pool2d(weight, (_BANDS, 1)))[..., 0]

    mean = by_band(half)
    spread = (by_band(half.square()) - mean.square()).clamp_min(0).sqrt()
    grey = half.mean(1, keepdim=True)
    across = F.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1))
    down = F.pad((grey[..., 1:, :] - grey[..., :-1, :]).abs(), (0, 0, 0, 1))
    vivid = by_band(half.amax(1, keepdim=True) - half.amin(1, keepdim=True))
    return torch.cat((mean, spread, vivid, 4 * by_band(across), 4 * by_band(down)), dim=1).flatten(1)


def expand_features(features: Tensor) -> Tensor:
    """The features and their squares, for a discriminant that can enclose a class."""
    return torch.cat((features, features.square()), dim=-1)


def _score_places(frames: Tensor, background: Tensor, tools: Tools) -> Tensor:
    """Log-probabilities [surroundings, lights], mean over the frames."""
    features = expand_features(place_features(frames, background).mean(0))
    return F.log_softmax(tools.place_weight @ features + tools.place_bias, dim=0).view(len(SURROUNDINGS), len(LIGHTS))


def measure_camera(frames: Tensor, background: Tensor) -> str:
    """The camera movement, of a range of speeds each, under which frames of different times agree best.

    Frames are looked at as from the clip's middle and compared, a quarter and a half of the clip apart, by the
    correlation of their edges, which a change of light leaves alone for the most part.
    """
    small = F.avg_pool2d(torch.cat((frames, background), dim=1), 2)[:: max(1, len(frames) // 16)]
    u = torch.linspace(-0.5, 0.5, len(small))

    def agreement(pan: float, zoom: float) -> float:
        seen = _look_from_middle(small, u, pan, zoom)
        edges, weight = _edges(seen[:, :3]), (seen[:, 3:] > 0.8).float()
        correlations = []
        for lag in (max(1, len(small) // 4), max(1, len(small) // 2)):
            both = weight[lag:] * weight[:-lag]
            one, two = edges[lag:] * both, edges[:-lag] * both
            norm = (one.square().flatten(1).sum(1) * two.square().flatten(1).sum(1)).sqrt()
            correlations.append(((one * two).flatten(1).sum(1) / norm.clamp_min(1e-6)).mean())
        return float(sum(correlations))

    tried = [("static", 0.0, 1.0)]
    for share in (0.5, 0.75, 1.0, 1.25):
        tried.append(("pan_left", -PAN_TRAVEL * share, 1.0))
        tried.append(("pan_right", PAN_TRAVEL * share, 1.0))
        tried.append(("zoom_in", 0.0, ZOOM_TRAVEL**share))
        tried.append(("zoom_out", 0.0, ZOOM_TRAVEL**-share))
    best = max(tried, key=lambda item: agreement(item[1], item[2]))[0]
    assert best in CAMERAS
    return best


def _edges(frames: Tensor) -> Tensor:
    grey = frames.mean(1, keepdim=True)
    return grey - F.avg_pool2d(grey, 9, stride=1, padding=4, count_include_pad=False)


def _look_from_middle(frames: Tensor, u: Tensor, pan: float, zoom: float) -> Tensor:
    """Undoes the camera's way from the clip's middle to each frame; zeros (weight 0) outside of what was seen."""
    _, _, height, width = frames.shape
    y = ((torch.arange(height) + 0.5) / height * 2 - 1).view(1, -1, 1)
    x = ((torch.arange(width) + 0.5) / width * 2 - 1).view(1, 1, -1)
    scale = torch.tensor(zoom) ** u.view(-1, 1, 1)
    grid = torch.stack(torch.broadcast_tensors((x - pan * u.view(-1, 1, 1)) * scale, y * scale), dim=-1)
    return F.grid_sample(frames, grid, align_corners=False)


assert len(MOTIONS) == 8  # measure_motion names them one by one
