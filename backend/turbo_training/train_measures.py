"""Makes the measuring tools from the procedural world alone: two small networks and the discriminant of places."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from turbo_training.measures import (
    PLACE,
    SaliencyNet,
    SubjectNet,
    cut_out,
    expand_features,
    half_side_of,
    locate,
    place_features,
    to_frames,
)
from turbo_training.scene import LIGHTS, SUBJECTS, SURROUNDINGS, Scene, sample_scene
from turbo_training.world import render, render_labels

_FRAMES = 4  # far apart in time: as varied as five clips, and cheaper


def degrade(frames: Tensor, generator: random.Random, *, strength: float = 1.0) -> Tensor:
    """Frames [N, 3, H, W] in [0, 1] as a lossy codec or VAE might give them back.

    A blur, a smaller size and back, noise of several sizes, and small errors of brightness and colour, each at random.
    """
    size = frames.shape[-2:]
    if generator.random() < 0.6:
        factor = 1 / (1 + strength * generator.random())
        smaller = F.interpolate(frames, scale_factor=factor, mode="bilinear", antialias=True)
        frames = F.interpolate(smaller, size=size, mode="bilinear")
    if generator.random() < 0.5:
        sigma = 0.3 + 1.0 * strength * generator.random()
        steps = torch.arange(-3, 4, device=frames.device)
        kernel = torch.exp(-(steps**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).to(frames).repeat(3, 1, 1, 1)
        frames = F.conv2d(F.pad(frames, (3, 3, 0, 0), mode="replicate"), kernel, groups=3)
        frames = F.conv2d(F.pad(frames, (0, 0, 3, 3), mode="replicate"), kernel.transpose(2, 3), groups=3)
    if generator.random() < 0.7:
        for scale in (1, 4, 16):
            noise = torch.randn(len(frames), 3, -(-size[0] // scale), -(-size[1] // scale), device=frames.device)
            noise = F.interpolate(noise, size=size, mode="bilinear") if scale > 1 else noise
            frames = frames + strength * generator.uniform(0, 0.03) * noise
    gain = 1 + strength * generator.uniform(-0.06, 0.06)
    shift = torch.tensor([generator.uniform(-0.03, 0.03) for _ in range(3)], device=frames.device).view(1, 3, 1, 1)
    return (frames * gain + strength * shift).clamp(0, 1)


def train_networks(
    steps: int, generator: random.Random, *, device: torch.device, on_step: Callable[[int, float], None]
) -> tuple[SaliencyNet, SubjectNet]:
    """Trains both on scenes of training and their degraded versions, by cross entropy."""
    saliency, subject = SaliencyNet().to(device), SubjectNet().to(device)
    parameters = [*saliency.parameters(), *subject.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        scenes = [sample_scene(generator, changing_light=0.2) for _ in range(8)]
        clips = render(scenes, num_frames=_FRAMES, device=device)
        height, width = clips.shape[2:4]
        labels = render_labels(
            scenes, num_frames=_FRAMES, height=height, width=width,
            label_height=height // PLACE, label_width=width // PLACE, device=device,
        ).flatten(0, 1)  # fmt: skip
        frames = torch.cat([to_frames(clip) for clip in clips])
        frames = degrade(frames, generator, strength=generator.choice((0.0, 1.0, 1.5)))
        where = F.binary_cross_entropy_with_logits(saliency(frames)[:, 0], (labels > 0).float())
        cuts, kinds = _draw_cuts(frames, labels, generator)
        what = F.cross_entropy(subject(cuts), kinds)
        optimizer.zero_grad()
        (where + 0.3 * what).backward()
        optimizer.step()
        schedule.step()
        on_step(step, float(what.detach()))
    return saliency.eval().requires_grad_(False), subject.eval().requires_grad_(False)


def _draw_cuts(frames: Tensor, labels: Tensor, generator: random.Random) -> tuple[Tensor, Tensor]:
    """Every visible subject cut out with errors of place and size, and its kind [n]."""
    cuts, kinds = [], []
    for kind in range(len(SUBJECTS)):
        mask = (labels == 1 + kind).float()
        x, y, area = locate(mask)
        seen = area > 4
        if seen.any():
            half = half_side_of(area[seen])
            jitter = torch.empty(3, len(half), device=half.device).uniform_(-1, 1)
            place = (x[seen] + 0.15 * half * jitter[0], y[seen] + 0.15 * half * jitter[1], half * (1 + 0.2 * jitter[2]))
            shown = frames[seen]
            if generator.random() < 0.5:
                shown = shown.flip(3)
                place = (mask.shape[2] - place[0], *place[1:])
            # Subjects spin: at any angle in half of the cuts.
            angle = torch.pi * torch.empty_like(half).uniform_(-1, 1) * (torch.rand_like(half) < 0.5)
            middle_x, middle_y, half_side = (PLACE * value for value in place)
            cuts.append(cut_out(shown, middle_x, middle_y, half_side, angle))
            kinds.append(torch.full((len(half),), kind, device=half.device))
    return torch.cat(cuts), torch.cat(kinds)


@torch.no_grad()
def fit_places(
    net: SaliencyNet, num_scenes: int, generator: random.Random, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The discriminant of the 18 (surroundings, light) classes: logistic regression on the features and their squares.

    Returns:
        weight [classes, features] and bias [classes].
    """
    features, classes = [], []
    for begin in range(0, num_scenes, 16):
        scenes = [sample_scene(generator) for _ in range(min(16, num_scenes - begin))]
        for scene, clip in zip(scenes, render(scenes, num_frames=_FRAMES, device=device), strict=True):
            frames = degrade(to_frames(clip), generator, strength=generator.choice((0.0, 1.0, 1.5)))
            background = 1 - net.find(frames)[:, None]
            features.append(place_features(frames, background).cpu())
            classes.append(torch.full((len(frames),), _class_of(scene)))
    x, target = expand_features(torch.cat(features)).double(), torch.cat(classes)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-3)
    weight, bias = _logistic_regression((x - mean) / std, target, num_classes=len(SURROUNDINGS) * len(LIGHTS))
    weight = weight / std
    return weight.float(), (bias - weight @ mean).float()


def _class_of(scene: Scene) -> int:
    return SURROUNDINGS.index(scene.surroundings) * len(LIGHTS) + LIGHTS.index(scene.light)


def _logistic_regression(x: Tensor, target: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=120, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(x @ weight.T + bias, target) + 1e-4 * weight.square().sum()
            loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def make_measures(
    path: Path,
    *,
    steps: int = 500,
    num_scenes: int = 1500,
    seed: int = 0,
    device: torch.device | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains both tools and writes them to one safetensors file."""
    device = device or torch.device("cpu")
    torch.manual_seed(seed)
    generator = random.Random(seed)
    saliency, subject = train_networks(steps, generator, device=device, on_step=on_step)
    weight, bias = fit_places(saliency, num_scenes, generator, device=device)
    tensors = {
        f"{name}.{key}": tensor.to("cpu", torch.float16).contiguous()
        for name, net in (("saliency", saliency), ("subject", subject))
        for key, tensor in net.state_dict().items()
    }
    tensors |= {"places.weight": weight.contiguous(), "places.bias": bias.contiguous()}
    save_file(tensors, path, metadata={"format": "pt", "source": f"procedural world, seed {seed}, {steps} steps"})
