"""All stages of a run in order, each resuming or skipped if it is done."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.tokenizer import Tokenizer
from turbo_training.attention_forward import TrainingAttention
from turbo_training.distill_rcm import RCMStage
from turbo_training.export import export_weights
from turbo_training.finetune_sla import SparseStage
from turbo_training.latents import LatentBank, load_bank, write_latents
from turbo_training.samples import StageSampler
from turbo_training.shapes import RunShape
from turbo_training.text_forward import TextSource
from turbo_training.train_teacher import TeacherStage, make_denoiser, take_image
from turbo_training.train_text import TextStage
from turbo_training.train_tokenizer import train_tokenizer
from turbo_training.train_vae import VAEStage, load_vae
from turbo_training.trainer import Budget, Paused, Stage, is_done, load_modules, run_stage

STAGES = ("vae", "text", "latents", "teacher", "sla", "rcm", "i2v_latents", "i2v", "i2v_sla", "i2v_rcm", "export")
#: Stages that leave a denoiser.
DENOISERS = ("teacher", "sla", "rcm", "i2v", "i2v_sla", "i2v_rcm")


@dataclass(slots=True, kw_only=True)
class Run:
    """One training run in one folder.

    Attributes:
        minutes: of all stages together, of which each takes its share.
        pause_at: value of `time.monotonic()` at which to save and stop.
    """

    shape: RunShape
    folder: Path
    minutes: float
    seed: int
    device: torch.device
    pause_at: float = math.inf
    quiet: bool = False
    _banks: dict[str, LatentBank] = field(default_factory=dict)

    def train(self, stages: tuple[str, ...] = STAGES) -> dict[str, float]:
        """Runs the stages that are not done yet; returns seconds by stage.

        Raises:
            Paused: the time is up; the same call again goes on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_float32_matmul_precision("high")
        seconds: dict[str, float] = {}
        if not (self.folder / "tokenizer" / "tokenizer.json").is_file():
            train_tokenizer(self.folder / "tokenizer", vocab_size=self.shape.model.text_encoder.vocab_size)
        for name in stages:
            started = time.monotonic()
            if name == "export":
                self.export()
            elif name in ("latents", "i2v_latents"):
                self.write_latents(name)
            elif not is_done(self.folder / name):
                self._run(name)
            seconds[name] = time.monotonic() - started
        return seconds

    def _run(self, name: str) -> None:
        size = getattr(self.shape, name)
        budget = Budget(max_steps=size.max_steps, minutes=max(size.share * self.minutes, 1e-6))
        run_stage(
            self._make(name),
            self.folder / name,
            budget,
            seed=self.seed,
            pause_at=self.pause_at,
            quiet=self.quiet,
            finish=lambda: self._write_sheet(name),
        )

    def _make(self, name: str) -> Stage:
        shape, seed, device = self.shape, self.seed, self.device
        if name == "vae":
            return VAEStage(shape, seed=seed, device=device)
        if name == "text":
            return TextStage(shape, self.tokenizer(), seed=seed, device=device)
        model, bank, teacher = shape.model, "latents", "teacher"
        if name.startswith("i2v"):
            model, bank, teacher = shape.image_model, "i2v_latents", "i2v"
        if name == "teacher":
            net = make_denoiser(model.dit, seed).to(device)
        elif name == "sla":
            net = self.denoiser("teacher")
        elif name in ("i2v", "i2v_sla"):  # each begins as the stage of text-to-video that it is like
            net = take_image(self.denoiser("teacher" if name == "i2v" else "sla"), model.dit)
        else:
            net = self.denoiser(name.replace("rcm", "sla"))
        size, latents = getattr(shape, name), self.bank(bank)
        if name == teacher:
            return TeacherStage(name, size, latents, net, seed=seed, device=device)
        dense = self.denoiser(teacher)
        if name.endswith("sla"):
            return SparseStage(name, size, latents, net, dense, seed=seed, device=device)
        sigma_max = model.default_sigma_max
        return RCMStage(name, size, latents, dense, net, sigma_max=sigma_max, seed=seed, device=device)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def text_source(self) -> TextSource:
        """The finished text encoder."""
        encoder = UMT5Encoder(self.shape.model.text_encoder)
        load_modules(self.folder / "text", {"ema": encoder})
        return TextSource(encoder.to(self.device).eval().requires_grad_(False), self.tokenizer(), self.device)

    def denoiser(self, stage: str) -> WanDiT:
        """The finished denoiser of a stage: `teacher`, `sla`, `rcm`, or `i2v`, `i2v_sla`, `i2v_rcm`."""
        model = self.shape.image_model if stage.startswith("i2v") else self.shape.model
        net = WanDiT(model.dit)
        load_modules(self.folder / stage, {"ema": net})
        return net.to(self.device).eval().requires_grad_(False)

    def write_latents(self, name: str) -> None:
        """Encodes clips of training, if that was not done."""
        path, size = self.folder / name / "latents.pt", getattr(self.shape, name)
        if path.is_file():
            return
        minutes = size.share * self.minutes
        if time.monotonic() + 60 * minutes > self.pause_at:
            raise Paused(f"{name}: not begun, since it is made at one go")
        is_i2v = name == "i2v_latents"
        write_latents(
            path,
            load_vae(self.shape, self.folder / "vae", self.device),
            self.tokenizer(),
            self.shape,
            task="i2v" if is_i2v else "t2v",
            num_clips=size.num_clips,
            minutes=minutes,
            seed=self.seed + 1 + is_i2v,
        )

    def bank(self, name: str) -> LatentBank:
        """Latents with their captions, of which one bank is kept on the device at a time."""
        if name not in self._banks:
            self._banks.clear()
            self._banks[name] = load_bank(self.folder / name / "latents.pt", self.text_source())
        return self._banks[name]

    def _write_sheet(self, name: str) -> None:
        if name in DENOISERS:
            self.sampler(name).write_sheet(self.folder / name / "sheet.png")

    def sampler(self, stage: str, *, attention: TrainingAttention | None = None, num_steps: int = 4) -> StageSampler:
        """What makes clips with the finished denoiser of a stage."""
        return StageSampler(
            stage=stage,
            shape=self.shape,
            net=self.denoiser(stage),
            texts=self.text_source(),
            vae=load_vae(self.shape, self.folder / "vae", self.device),
            attention=attention,
            num_steps=num_steps,
        )

    def export(self) -> None:
        """Writes `weights/`, which `TURBO_CHECKPOINT_DIR` takes for the models `tiny` and `tiny-I2V`."""
        model, image_model = self.shape.model, self.shape.image_model
        denoisers = {
            model.dit_files[0][0]: self.denoiser("rcm"),
            f"{model.dit_files[0][0]}-teacher": self.denoiser("teacher"),
            image_model.dit_files[0][0]: self.denoiser("i2v_rcm"),
        }
        export_weights(
            model,
            self.folder / "weights",
            denoisers=denoisers,
            text_encoder=self.text_source().encoder,
            vae=load_vae(self.shape, self.folder / "vae", self.device),
            tokenizer=self.folder / "tokenizer",
            source=f"turbo_training, seed {self.seed}, {self.minutes:g} minutes at most",
        )


def write_summary(run: Run, seconds: dict[str, float]) -> None:
    """`run.json`: seed, device, seconds of each stage."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    facts = {"seed": run.seed, "minutes": run.minutes, "device": device, "torch": torch.__version__, "seconds": seconds}
    (run.folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
