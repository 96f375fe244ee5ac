"""`python -m turbo_training`: train the tiny model, look at the world, make the measures."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from turbo_backend.checkpoints import tiny_checkpoint_folder
from turbo_backend.sampler import MAX_STEPS
from turbo_training.attention_forward import DENSE, TrainingAttention
from turbo_training.captions import LANGUAGES, caption
from turbo_training.export import import_weights
from turbo_training.judge import Accuracy, tally_by_subjects
from turbo_training.quality import Plan, read_recorded_teacher, run_quality, summarize, write_recorded_teacher
from turbo_training.run import DENOISERS, STAGES, Run, write_summary
from turbo_training.scene import sample_scene
from turbo_training.shapes import FULL, SMOKE
from turbo_training.sheets import write_sheet
from turbo_training.train_measures import make_measures
from turbo_training.trainer import Paused, is_done
from turbo_training.validate_measures import validate_measures
from turbo_training.world import render

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
StageName = Enum("StageName", {name: name for name in STAGES}, type=str)  # type: ignore[misc]
DenoiserName = Enum("DenoiserName", {name: name for name in DENOISERS}, type=str)  # type: ignore[misc]

Out = Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on from there.")]
Minutes = Annotated[float, typer.Option(min=0.01, help="Time of all stages together.")]
Smoke = Annotated[bool, typer.Option(help="A few steps of every stage at a toy size, on a CPU.")]
Pause = Annotated[float | None, typer.Option(min=0.1, help="Save and stop after so many minutes; again goes on.")]
Seed = Annotated[int, typer.Option(min=0)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")]


def _device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def _percent(accuracies: Mapping[str, Accuracy]) -> dict[str, float]:
    return {attribute: round(accuracy.percent, 2) for attribute, accuracy in accuracies.items()}


@app.command("all")
def train_all(
    out: Out,
    minutes: Minutes = 25.0,
    pause_after: Pause = None,
    smoke: Smoke = False,
    seed: Seed = 0,
    device: Device = "auto",
    weights: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Take VAE, text encoder and teacher from this folder."),
    ] = None,
) -> None:
    """Runs every stage that is not done, from the VAE to the exported files."""
    if weights is not None:
        import_weights((SMOKE if smoke else FULL).model, weights, out)
    _train(out, minutes, pause_after, smoke, seed, device, STAGES)


@app.command("stage")
def train_stage(
    name: StageName,
    out: Out,
    minutes: Minutes = 25.0,
    pause_after: Pause = None,
    smoke: Smoke = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Runs one stage; `--minutes` is still the time of all together, of which it takes its share."""
    _train(out, minutes, pause_after, smoke, seed, device, (name.value,))


def _train(
    out: Path,
    minutes: float,
    pause_after: float | None,
    smoke: bool,
    seed: int,
    device: str,
    stages: tuple[str, ...],
) -> None:
    run = Run(shape=SMOKE if smoke else FULL, folder=out, minutes=minutes, seed=seed, device=_device(device))
    if pause_after is not None:
        run.pause_at = time.monotonic() + 60 * pause_after
    try:
        seconds = run.train(stages)
    except Paused as paused:
        print(f"paused ({paused}): the same command goes on from here")
        return
    write_summary(run, seconds)
    print(" ".join(f"{name} {value:.0f}s" for name, value in seconds.items()))


@app.command("judge")
def judge_stage(
    name: Annotated[DenoiserName, typer.Argument(help="A finished stage.")],
    out: Out,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts, half of them Chinese.")] = 96,
    steps: Annotated[int, typer.Option(min=1, max=MAX_STEPS, help="Of the stages `rcm` and `i2v_rcm`.")] = 4,
    topk: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of key blocks; 0 for dense attention.")
    ] = None,
    smoke: Smoke = False,
    device: Device = "auto",
) -> None:
    """How often a stage's network shows what prompts say, by the training forwards; the last line is JSON.

    A quick look while training; `quality` measures exported files through the stages that serve.
    """
    if not is_done(out / name.value):
        raise typer.BadParameter(f"{out / name.value}: this stage is not done", param_hint="'NAME'")
    run = Run(shape=SMOKE if smoke else FULL, folder=out, minutes=1, seed=0, device=_device(device))
    attention = None if topk is None else DENSE if topk == 0 else TrainingAttention(topk=topk)
    verdicts = run.sampler(name.value, attention=attention, num_steps=steps).judge(prompts)
    percent = {some: _percent(accuracies) for some, accuracies in tally_by_subjects(verdicts).items()}
    print(json.dumps({"stage": name.value, "prompts": prompts, "percent": percent}))


@app.command("world")
def show_world(out: Out, count: Annotated[int, typer.Option(min=1)] = 12, seed: Seed = 0) -> None:
    """Writes a contact sheet of scenes with their captions."""
    out.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    scenes = [sample_scene(generator) for _ in range(count)]
    captions = [caption(scene, LANGUAGES[i % len(LANGUAGES)], generator) for i, scene in enumerate(scenes)]
    write_sheet(list(render(scenes)), captions, out / "world.png")


@app.command("measures")
def train_measures(
    out: Annotated[Path, typer.Option(help="File to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    scenes: Annotated[int, typer.Option(min=18)] = 3000,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Trains the tools that measure clips (see `turbo_training.measures`)."""

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}: {loss:.4f}", flush=True)

    make_measures(out, steps=steps, num_scenes=scenes, seed=seed, device=_device(device), on_step=report)


@app.command("validate")
def validate(
    clips: Annotated[int, typer.Option(min=1, help="Clips of each kind.")] = 100,
    frames: Annotated[int, typer.Option(min=5)] = 33,
) -> None:
    """How often the measures are right about held-out clips of the world itself; the last line is JSON."""
    found: dict[str, dict[str, float]] = {}
    for num_actors in (1, 2):
        for strength in (0.0, 1.0):
            accuracies = validate_measures(clips, num_actors=num_actors, strength=strength, num_frames=frames)
            name = f"{num_actors} subject(s), {'degraded' if strength else 'as rendered'}"
            found[name] = _percent(accuracies)
            print(name, found[name], flush=True)
    print(json.dumps({"clips": clips, "percent": found}))


@app.command("quality")
def measure_quality(
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the model `tiny`; by default the embedded one.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts, half of them Chinese.")] = 100,
    free: Annotated[
        bool, typer.Option(help="Word prompts as training does, with adjectives and unsaid daylight.")
    ] = False,
    dense: Annotated[int, typer.Option(min=1, help="Prompts for dense attention.")] = 60,
    compared: Annotated[int, typer.Option(min=1, help="Prompts for 2 steps and int8.")] = 16,
    variants: Annotated[int, typer.Option(min=1, help="Prompts for each other variant.")] = 4,
    teacher: Annotated[int, typer.Option(min=0, help="Prompts for the teacher: minutes each on a CPU.")] = 0,
    images: Annotated[int, typer.Option(min=0, help="Images for image-to-video.")] = 12,
    frames: Annotated[int, typer.Option(min=5, help="Frames of each clip.")] = 33,
    seconds: Annotated[float, typer.Option(min=1, help="Time after which no further prompt is begun.")] = 570.0,
    sheet: Annotated[Path | None, typer.Option(help="PNG of twelve scenes, and of images beside it.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Measures a model on prompts that were held out of training; the last line is JSON."""
    folder = weights or tiny_checkpoint_folder()
    plan = Plan(
        num_prompts=prompts,
        free_captions=free,
        num_dense_prompts=dense,
        num_compared_prompts=compared,
        num_variant_prompts=variants,
        num_teacher_prompts=min(teacher, prompts),
        num_image_prompts=images,
        num_frames=frames,
        seconds=seconds,
    )
    results = run_quality(folder, plan, device=device, sheet=sheet, say=lambda text: print(text, flush=True))
    if teacher and not free:
        write_recorded_teacher(folder, results)
    summary = summarize(results, recorded_teacher=None if free else read_recorded_teacher(folder))
    print(json.dumps({"device": device, "torch": torch.__version__, **summary}))


if __name__ == "__main__":
    app()
