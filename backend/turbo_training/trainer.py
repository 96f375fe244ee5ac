"""What all training stages share: the loop with its time limit, checkpoints, resuming, EMA, loss plots."""

from __future__ import annotations

import json
import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from turbo_training.compiling import RecordedSteps
from turbo_training.muon import Muon

_FETCHED_TOGETHER = 25


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
        recorded: runs steps as CUDA graphs.
    """

    name: str

    def __init__(self, *, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)  # of the initial weights, which subclasses draw
        self.device = device
        self.generator = random.Random(seed)
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.recorded = RecordedSteps(device)

    @abstractmethod
    def step(self, index: int, progress: float) -> dict[str, torch.Tensor]:
        """Does one step, weights included, and returns losses by name, left on the device; `progress` is 0 to 1."""

    def after(self, folder: Path) -> None:  # noqa: B027 - most stages have nothing to add
        """Called once when the stage is over: sample sheets, final statistics."""

    @property
    def is_on_gpu(self) -> bool:
        """Whether to compute in bfloat16, with compiled functions and fused optimizers."""
        return self.device.type == "cuda"

    def precision(self) -> torch.autocast:
        """bfloat16 on a GPU, float32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_on_gpu)

    def make_optimizer(
        self, parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], weight_decay: float
    ) -> torch.optim.AdamW:
        """AdamW whose learning rate `set_learning_rates` sets at each step; on a GPU it can be recorded."""
        return torch.optim.AdamW(
            parameters,
            lr=torch.zeros((), device=self.device),
            betas=betas,
            weight_decay=weight_decay,
            fused=self.is_on_gpu,
            capturable=self.is_on_gpu,
        )

    def make_optimizers(
        self,
        network: nn.Module,
        is_inner: Callable[[str, nn.Parameter], bool],
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> dict[str, torch.optim.Optimizer]:
        """Muon for the weights that `is_inner` says lie inside, AdamW for all others that are trained."""
        inner: list[nn.Parameter] = []
        outer: list[nn.Parameter] = []
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                (inner if is_inner(name, parameter) else outer).append(parameter)
        return {
            "inner": Muon(inner, lr=torch.zeros((), device=self.device), weight_decay=weight_decay),
            "outer": self.make_optimizer(outer, betas=betas, weight_decay=weight_decay),
        }

    def set_learning_rates(self, peak: float, index: int, progress: float, *, warmup: int) -> None:
        """Of all optimizers: linear warm-up by steps, then a cosine to a twentieth of the peak by progress."""
        rate = peak * min(1.0, (index + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)

    def step_optimizers(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers.values():
            optimizer.step()


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


class Paused(Exception):
    """The time of this call is over; the same call again goes on from the checkpoint."""


def run_stage(
    stage: Stage,
    folder: Path,
    budget: Budget,
    *,
    seed: int,
    pause_at: float = math.inf,
    finish: Callable[[], None] = lambda: None,
    save_seconds: float = 60.0,
    quiet: bool = False,
) -> None:
    """Runs a stage to the end of its budget, resuming where an earlier run of the same folder stopped.

    A resumed run goes on with the same weights, optimizer states and random numbers: steps that are limited by number
    (not by time) give the same weights as without the interruption.

    Args:
        pause_at: value of `time.monotonic()` at which to save and stop.
        finish: called after the stage's own `after`, before the stage counts as done.

    Raises:
        FloatingPointError: a loss that is not finite; the last checkpoint stays as it is.
        Paused: `pause_at` is reached before the budget is used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    torch.manual_seed(seed)
    index, seconds_before = _restore(stage, checkpoint) if checkpoint.is_file() else (0, 0.0)
    started = saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeElapsedColumn())
    with Progress(*columns, disable=quiet) as bar, _Log(folder / "losses.jsonl", stage.name, index) as log:
        task = bar.add_task(stage.name, total=1.0, shown="")
        while True:
            now = time.monotonic()
            seconds = seconds_before + now - started
            progress = budget.progress(index, seconds)
            if progress >= 1.0 or now >= pause_at or now - saved > save_seconds:
                log.write()
                _save(stage, checkpoint, index, seconds)
                saved = now
            if progress >= 1.0:
                break
            if now >= pause_at:
                raise Paused(f"{stage.name}: {100 * progress:.0f} % done, {index} steps")
            log.add(index, seconds, stage.step(index, progress))
            index += 1
            bar.update(task, completed=progress, shown=f"{index} {log.shown}")
    plot_losses(folder / "losses.jsonl", folder / "losses.png")
    stage.after(folder)
    finish()
    (folder / "done").write_text(f"{index} steps\n", encoding="utf-8")


class _Log:
    """Losses of each step as lines of JSON, fetched from the device many steps at a time: a fetch waits for it."""

    def __init__(self, path: Path, name: str, num_steps: int) -> None:
        if path.is_file():  # without what came after the checkpoint
            kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:num_steps]
            path.write_text("".join(kept), encoding="utf-8")
        self._name, self._file = name, path.open("a", encoding="utf-8")
        self._waiting: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self.shown = ""

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, step: int, seconds: float, losses: dict[str, torch.Tensor]) -> None:
        self._waiting.append((step, seconds, losses))
        if len(self._waiting) >= _FETCHED_TOGETHER:
            self.write()

    def write(self) -> None:
        """Raises FloatingPointError for a loss that is not finite."""
        if not self._waiting:
            return
        values = iter(
            torch.stack([loss.detach().float() for *_, losses in self._waiting for loss in losses.values()]).tolist()
        )
        for step, seconds, losses in self._waiting:
            found = {name: round(next(values), 6) for name in losses}
            if not all(math.isfinite(value) for value in found.values()):
                raise FloatingPointError(f"{self._name}: step {step} gave {found}")
            self._file.write(json.dumps({"step": step, "seconds": round(seconds, 3), **found}) + "\n")
            self.shown = " ".join(f"{name} {value:.4g}" for name, value in found.items())
        self._waiting.clear()
        self._file.flush()


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
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].to(stage.device)
    version, words, gauss = state["scenes"]
    stage.generator.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if stage.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], stage.device)
    return int(state["step"]), float(state["seconds"])


def plot_losses(log: Path, path: Path, *, size: tuple[int, int] = (900, 420)) -> None:
    """One curve a loss over steps, smoothed, on a logarithmic scale of its own; labels carry first and last value."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    colors = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
    names = sorted({name for row in rows for name in row} - {"step", "seconds"})
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
