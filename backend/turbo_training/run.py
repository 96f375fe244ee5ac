"""All stages of a run in order, each resuming or skipped if it is done."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.sampler import RCMSchedule, sample_steps
from turbo_backend.tokenizer import Tokenizer
from turbo_training.captions import caption
from turbo_training.distill_rcm import RCMStage
from turbo_training.dit_forward import TrainingAttention
from turbo_training.export import export_weights
from turbo_training.finetune_sla import SLAStage
from turbo_training.flow import Batches, TextSource, sample_teacher, velocity_of
from turbo_training.latents import fill_bank
from turbo_training.scene import sample_scene
from turbo_training.shapes import RunShape, StageShape
from turbo_training.sheets import to_clip, write_sheet
from turbo_training.train_teacher import TeacherStage
from turbo_training.train_text import TextStage
from turbo_training.train_tokenizer import train_tokenizer
from turbo_training.train_vae import VAEStage, load_vae
from turbo_training.trainer import Budget, Stage, is_done, load_modules, run_stage
from turbo_training.vae_forward import decode_latents, latent_statistics

STAGES = ("vae", "text", "teacher", "sla", "rcm", "export")
#: Latents take so much less time than they save that stages after the first fill the bank again.
_SHEET_PROMPTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run in one folder."""

    shape: RunShape
    folder: Path
    minutes: float
    seed: int
    device: torch.device
    quiet: bool = False

    def train(self, stages: tuple[str, ...] = STAGES) -> dict[str, float]:
        """Runs the stages that are not done yet; returns seconds by stage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_float32_matmul_precision("high")
        seconds: dict[str, float] = {}
        if not (self.folder / "tokenizer" / "tokenizer.json").is_file():
            train_tokenizer(self.folder / "tokenizer", vocab_size=self.shape.model.text_encoder.vocab_size)
        batches: Batches | None = None
        for name in stages:
            started = time.monotonic()
            if name == "export":
                self.export()
            elif not is_done(self.folder / name):
                if name in ("teacher", "sla", "rcm") and batches is None:
                    batches = self.fill_batches()
                    seconds["latents"] = time.monotonic() - started
                    started = time.monotonic()
                self._run(self._make(name, batches), getattr(self.shape, name))
                if name in ("teacher", "sla", "rcm"):
                    self.draw_samples(name)
            seconds[name] = time.monotonic() - started
        return seconds

    def _run(self, stage: Stage, size: StageShape) -> None:
        budget = Budget(max_steps=size.max_steps, minutes=max(size.share * self.minutes, 1e-6))
        run_stage(stage, self.folder / stage.name, budget, seed=self.seed, quiet=self.quiet)

    def _make(self, name: str, batches: Batches | None) -> Stage:
        if name == "vae":
            return VAEStage(self.shape, seed=self.seed, device=self.device)
        if name == "text":
            return TextStage(self.shape, self.tokenizer(), seed=self.seed, device=self.device)
        assert batches is not None
        if name == "teacher":
            return TeacherStage(self.shape, batches, seed=self.seed, device=self.device)
        teacher = self.denoiser("teacher")
        if name == "sla":
            return SLAStage(self.shape, batches, teacher, seed=self.seed, device=self.device)
        assert name == "rcm"
        return RCMStage(self.shape, batches, teacher, self.denoiser("sla"), seed=self.seed, device=self.device)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder / "tokenizer")

    def text_source(self) -> TextSource:
        """The finished text encoder."""
        encoder = UMT5Encoder(self.shape.model.text_encoder)
        load_modules(self.folder / "text", {"ema": encoder})
        return TextSource(encoder.to(self.device).eval().requires_grad_(False), self.tokenizer(), self.device)

    def denoiser(self, stage: str) -> WanDiT:
        """The finished denoiser of a stage: `teacher`, `sla` or `rcm`."""
        net = WanDiT(self.shape.model.dit)
        load_modules(self.folder / stage, {"ema": net})
        return net.to(self.device).eval().requires_grad_(False)

    def fill_batches(self) -> Batches:
        """Latents and text for the denoiser's stages."""
        vae = load_vae(self.shape, self.folder / "vae", self.device)
        minutes = self.shape.latents_share * self.minutes
        bank = fill_bank(vae, self.shape, seed=self.seed + 1, device=self.device, minutes=minutes)
        return Batches(bank, self.text_source())

    @torch.no_grad()
    def draw_samples(self, stage: str) -> None:
        """A sheet of held-out prompts: the teacher with guidance, students in four steps."""
        shape, generator = self.shape, random.Random(11)
        scenes = [sample_scene(generator, held_out=True) for _ in range(min(_SHEET_PROMPTS, shape.rcm.batch_size))]
        captions = [caption(scene, ("en", "zh")[i % 2], generator) for i, scene in enumerate(scenes)]
        texts, net = self.text_source(), self.denoiser(stage)
        text = texts.embed(captions)
        size = (shape.model.vae.z_dim, 1 + (shape.num_frames - 1) // 4, shape.height // 8, shape.width // 8)
        noise = torch.randn(
            len(scenes), *size, device=self.device, generator=torch.Generator(self.device).manual_seed(7)
        )
        if stage == "rcm":
            student = velocity_of(net, TrainingAttention(topk=0.15))

            def function(x: torch.Tensor, timesteps: torch.Tensor, _step: int) -> torch.Tensor:
                return student(x.float(), timesteps.float().to(x.device) / 1000, text)

            *_, last = sample_steps(function, lambda _step: torch.randn_like(noise), RCMSchedule(4, 80.0), ode=False)
            latents = last.latents.float()
        else:
            attention = TrainingAttention(topk=0.15 if stage == "sla" else None)
            latents = sample_teacher(velocity_of(net, attention), noise, text, texts.nothing(len(scenes)), num_steps=25)
        vae = load_vae(shape, self.folder / "vae", self.device)
        shift, scale = latent_statistics(vae, self.device)
        clips = [to_clip(decode_latents(vae, latent[None] * scale + shift)[0]).cpu() for latent in latents]
        write_sheet(clips, captions, self.folder / stage / "sheet.png")

    def export(self) -> None:
        """Writes `weights/`, which `TURBO_CHECKPOINT_DIR` takes for the model `tiny`."""
        source = f"turbo_training, seed {self.seed}, {self.minutes:g} minutes at most"
        export_weights(
            self.shape,
            self.folder / "weights",
            denoiser=self.denoiser("rcm"),
            teacher=self.denoiser("teacher"),
            text_encoder=self.text_source().encoder,
            vae=load_vae(self.shape, self.folder / "vae", self.device),
            tokenizer=self.folder / "tokenizer",
            source=source,
        )


def write_summary(run: Run, seconds: dict[str, float]) -> None:
    """`run.json`: seed, device, seconds of each stage."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    facts = {"seed": run.seed, "minutes": run.minutes, "device": device, "torch": torch.__version__, "seconds": seconds}
    (run.folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
