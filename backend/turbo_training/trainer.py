"""What all training stages share: the loop with its time limit, checkpoints, resuming, EMA, loss plots."""

from __future__ import annotations

import json
import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When a stage ends: after so many steps, or so many minutes of work, whichever comes first."""

    max_steps: int
    minutes: float

    def progress(self, step: int, seconds: float) -> float:
        """How much of the budget is used, 0 to 1."""
        return min(1.0, max(step / self.max_steps, seconds / (60 * self.minutes)))


class Stage(ABC):
    """One stage of training.

    Attributes:
        name: of its folder.
        modules: networks that it trains, to be saved.
        optimizers: theirs, to be saved.
        generator: source of scenes and captions, to be saved; tensors are drawn from torch's global generators.
    """

    name: str

    def __init__(self, *, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)  # of the initial weights, which subclasses draw
        self.device = device
        self.generator = random.Random(seed)
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    @abstractmethod
    def step(self, index: int, progress: float) -> dict[str, float]:
        """Does one step, weights included, and returns losses by name; `progress` is 0 to 1."""

    def after(self, folder: Path) -> None:  # noqa: B027 - most stages have nothing to add
        """Called once when the stage is over: sample sheets, final statistics."""

    def precision(self) -> torch.autocast:
        """bfloat16 on a GPU, float32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


class EMA:
    """Running mean of a module's parameters, held in a module of its own.

    The decay rises from 0 to its limit as (1 + n) / (10 + n), so that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, average: nn.Module, *, decay: float) -> None:
        self._module, self._average, self._decay = module, average, decay
        average.load_state_dict(module.state_dict())
        average.requires_grad_(False)

    @torch.no_grad()
    def update(self, index: int) -> None:
        """Takes in the weights after step `index`."""
        decay = min(self._decay, (1 + index) / (10 + index))
        mine: list[torch.Tensor] = list(self._average.parameters())
        theirs: list[torch.Tensor] = list(self._module.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, index: int, progress: float, warmup: int) -> None:
    """Linear warm-up by steps, then a cosine to a twentieth of the peak by progress."""
    rate = peak * min(1.0, (index + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def run_stage(
    stage: Stage, folder: Path, budget: Budget, *, seed: int, save_seconds: float = 60.0, quiet: bool = False
) -> None:
    """Runs a stage to the end of its budget, resuming where an earlier run of the same folder stopped.

    A resumed run goes on with the same weights, optimizer states and random numbers: steps that are limited by number
    (not by time) give the same weights as without the interruption.

    Raises:
        FloatingPointError: a loss that is not finite; the last checkpoint stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "losses.jsonl"
    torch.manual_seed(seed)
    index, seconds_before = _restore(stage, checkpoint) if checkpoint.is_file() else (0, 0.0)
    _keep_lines(log, index)
    started = saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeElapsedColumn())
    with Progress(*columns, disable=quiet) as bar, log.open("a", encoding="utf-8") as lines:
        task = bar.add_task(stage.name, total=1.0, shown="")
        while True:
            seconds = seconds_before + time.monotonic() - started
            progress = budget.progress(index, seconds)
            if progress >= 1.0:
                break
            losses = stage.step(index, progress)
            if not all(math.isfinite(value) for value in losses.values()):
                raise FloatingPointError(f"{stage.name}: step {index} gave {losses}")
            lines.write(json.dumps({"step": index, **{name: round(value, 6) for name, value in losses.items()}}) + "\n")
            index += 1
            shown = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
            bar.update(task, completed=progress, shown=f"{index} {shown}")
            if time.monotonic() - saved > save_seconds:
                lines.flush()
                _save(stage, checkpoint, index, seconds_before + time.monotonic() - started)
                saved = time.monotonic()
    _save(stage, checkpoint, index, seconds_before + time.monotonic() - started)
    plot_losses(log, folder / "losses.png")
    stage.after(folder)
    (folder / "done").write_text(f"{index} steps\n", encoding="utf-8")


def is_done(folder: Path) -> bool:
    """Whether a stage ended in this folder."""
    return (folder / "done").is_file()


def load_modules(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Fills modules from a stage's checkpoint, strictly."""
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])


def _save(stage: Stage, path: Path, index: int, seconds: float) -> None:
    version, words, gauss = stage.generator.getstate()
    state = {
        "step": index,
        "seconds": seconds,
        "modules": {name: module.state_dict() for name, module in stage.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in stage.optimizers.items()},
        "scenes": [version, list(words), gauss],
        "torch": torch.get_rng_state(),
    }
    if stage.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(stage.device)
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _restore(stage: Stage, path: Path) -> tuple[int, float]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    for name, optimizer in stage.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    version, words, gauss = state["scenes"]
    stage.generator.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if stage.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], stage.device)
    return int(state["step"]), float(state["seconds"])


def _keep_lines(log: Path, count: int) -> None:
    """Drops what was logged after the checkpoint."""
    if log.is_file():
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        log.write_text("".join(kept), encoding="utf-8")


def plot_losses(log: Path, path: Path, *, size: tuple[int, int] = (900, 420)) -> None:
    """One curve a loss over steps, smoothed, on a logarithmic scale of its own; labels carry first and last value."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    colors = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
    names = sorted({name for row in rows for name in row} - {"step"})
    for i_name, name in enumerate(names):
        points = [(row["step"], max(abs(row[name]), 1e-12)) for row in rows if name in row]
        smooth: list[tuple[float, float]] = []
        for step, value in points:
            last = smooth[-1][1] if smooth else math.log(value)
            smooth.append((step, last + (math.log(value) - last) * max(0.03, 1 / (1 + len(smooth)))))
        low, high = min(v for _, v in smooth), max(v for _, v in smooth)
        width, height = size[0] - 60, size[1] - 60
        steps = max(1, rows[-1]["step"])
        line = [
            (30 + width * step / steps, 30 + height * (high - value) / max(high - low, 1e-9)) for step, value in smooth
        ]
        color = colors[i_name % len(colors)]
        if len(line) > 1:
            draw.line(line, fill=color, width=2)
        draw.text((40, 8 + 12 * i_name), f"{name}: {points[0][1]:.4g} -> {points[-1][1]:.4g}", fill=color)
    picture.save(path)
