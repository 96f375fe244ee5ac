"""How well a model does what prompts say, measured from its files: every figure beside its target.

Prompts describe scenes whose combinations of attributes were held out of training; each scene is put in English and in
Chinese, with the same seed. A clip is made by the same stages that serve requests and judged by `measures`. Variants
(fewer steps, other attention, int8) run on the first of the same prompts and seeds. So all differences are paired.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from turbo_backend.checkpoints import DenoiserLayout, open_checkpoint
from turbo_backend.config import MODELS
from turbo_backend.nets.vae import WanVAE
from turbo_backend.noise import draw_noise
from turbo_backend.parameters import Delivery, make_parameters
from turbo_backend.pipeline import Pipeline
from turbo_backend.settings import Settings
from turbo_backend.stages.loading import load_text_encoder, load_vae_decoder
from turbo_backend.stages.text_encoder import EncodedPrompt
from turbo_backend.stages.vae_decoder import DecodedVideo, DecodeRequest
from turbo_training.captions import caption
from turbo_training.dit_forward import Condition, TextBatch
from turbo_training.flow import sample_teacher, velocity_of
from turbo_training.image_quality import ImageVerdict, measure_image_to_video
from turbo_training.judge import Accuracy, Verdict, judge, tally, tally_by_subjects
from turbo_training.measures import measure
from turbo_training.scene import Scene, sample_scene
from turbo_training.sheets import to_clip, to_video, write_sheet
from turbo_training.train_vae import psnr
from turbo_training.world import render

#: Attributes with a target, in percent, for the student at four steps.
TARGETS = {"subject": 85.0, "color": 92.0, "motion": 88.0, "surroundings": 90.0, "light": 90.0}
_TEACHER_STEPS = 50
_PSNR_TARGET, _FIRST_FRAME_TARGET, _IMAGE_MOTION_TARGET = 30.0, 28.0, 85.0

#: Clips of a contact sheet.
_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One held-out scene in words."""

    scene: Scene
    language: str
    text: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the student."""

    num_steps: int = 4
    attention_type: str = "sagesla"
    sla_topk: float = 0.15
    quant_linear: bool = False

    @property
    def name(self) -> str:
        topk = "" if self.attention_type == "original" else f" {self.sla_topk:.2f}"
        return f"{self.num_steps} steps, {self.attention_type}{topk}{', int8' if self.quant_linear else ''}"


MAIN = Variant()
_TWO_STEPS, _DENSE, _INT8 = Variant(num_steps=2), Variant(attention_type="original"), Variant(quant_linear=True)
#: Held against `MAIN` with a target each, as dense attention is: on more prompts than the rest.
COMPARED = (_TWO_STEPS, _INT8)
VARIANTS = (
    *COMPARED,
    _DENSE,
    *(Variant(num_steps=n) for n in (1, 3)),
    *(Variant(attention_type="sla", sla_topk=topk) for topk in (0.05, 0.10, 0.15)),
    *(Variant(sla_topk=topk) for topk in (0.05, 0.10)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        num_prompts: for the student as it is served by default.
        free_captions: prompts are worded as those of training are (`captions.caption`).
        num_dense_prompts: the first of them, for dense attention: it is to be within 2 points, and a clip that is
            missed in everything costs 60 over their number.
        num_compared_prompts, num_variant_prompts: the first of them, for each variant of `COMPARED` and each other.
        num_teacher_prompts: the first of them, for the teacher, if its file is there.
        num_psnr_clips: clips through the VAE.
        num_image_prompts: images for image-to-video, if its file is there.
        num_frames: of each clip.
        seconds: no further prompt of the main figures is begun after this; variants come first.
    """

    num_prompts: int = 100
    free_captions: bool = False
    num_dense_prompts: int = 60
    num_compared_prompts: int = 16
    num_variant_prompts: int = 4
    num_teacher_prompts: int = 0
    num_psnr_clips: int = 3
    num_image_prompts: int = 12
    num_frames: int = 33
    seconds: float = 570.0
    variants: tuple[Variant, ...] = VARIANTS

    def count(self, variant: Variant) -> int:
        """Prompts for a variant."""
        if variant == _DENSE:
            wanted = self.num_dense_prompts
        else:
            wanted = self.num_compared_prompts if variant in COMPARED else self.num_variant_prompts
        return min(self.num_prompts, wanted)


@dataclass(slots=True)
class Results:
    """Verdicts by variant name, in the order of the prompts, and milliseconds of denoising."""

    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    images: list[ImageVerdict] = field(default_factory=list)

    def add(self, name: str, verdict: Verdict, milliseconds: float) -> None:
        self.verdicts.setdefault(name, []).append(verdict)
        self.milliseconds.setdefault(name, []).append(milliseconds)


def draw_prompts(count: int, *, free: bool = False, seed: int = 2025) -> list[Prompt]:
    """Held-out scenes, one in five with two subjects, each in English and then in Chinese."""
    generator = random.Random(seed)
    prompts: list[Prompt] = []
    for i in range(-(-count // 2)):
        scene = sample_scene(generator, held_out=True)
        for language in ("en", "zh"):
            text = caption(scene, language, generator, free=free)
            prompts.append(Prompt(scene=scene, language=language, text=text, seed=1000 + i))
    return prompts[:count]


def run_quality(
    folder: Path, plan: Plan, *, device: str = "cpu", sheet: Path | None = None, say: Callable[[str], None] = print
) -> Results:
    """Measures the model `tiny` whose files are in `folder`.

    Args:
        sheet: where to write a contact sheet of the first twelve scenes, English and Chinese by turns; one of
            image-to-video goes beside it.
        say: told about each finished part.
    """
    started = time.monotonic()
    settings = Settings.from_environment({"TURBO_CHECKPOINT_DIR": str(folder), "TURBO_DEVICE": device})
    pipeline = Pipeline.from_settings(settings)
    prompts, results = draw_prompts(plan.num_prompts, free=plan.free_captions), Results()
    results.psnr = list(_measure_vae(settings, plan))
    say(f"VAE: {sum(results.psnr) / len(results.psnr):.1f} dB over {len(results.psnr)} clips")
    for quantized in (False, True):
        chosen = [variant for variant in plan.variants if variant.quant_linear is quantized]
        if not chosen:
            continue
        served = (
            pipeline if not quantized else Pipeline.from_settings(settings.model_copy(update={"quant_linear": True}))
        )
        for variant in chosen:
            for prompt in prompts[: plan.count(variant)]:
                _run(served, prompt, variant, plan, results)
            say(_line(variant.name, results.verdicts[variant.name]))
    if plan.num_teacher_prompts:
        _run_teacher(settings, prompts[: plan.num_teacher_prompts], plan, results)
        say(_line("teacher", results.verdicts["teacher"]))
    if plan.num_image_prompts and (folder / f"{MODELS['tiny-I2V'].dit_files[0][0]}.safetensors").is_file():
        served = Pipeline.from_settings(settings.model_copy(update={"models": ("tiny-I2V",)}))
        results.images = list(
            measure_image_to_video(served, num_prompts=plan.num_image_prompts, num_frames=plan.num_frames)
        )
        say(f"image-to-video ({len(results.images)} clips): first frame {_mean_first_frame(results):.1f} dB")
    clips: list[torch.Tensor] = []
    texts: list[str] = []
    for index, prompt in enumerate(prompts):
        if index >= plan.num_compared_prompts and time.monotonic() - started > plan.seconds:
            say(f"time is up after {index} of {len(prompts)} prompts")
            break
        clip = _run(pipeline, prompt, MAIN, plan, results)
        results.languages.append(prompt.language)
        if len(clips) < _SHOWN and index // 2 % 2 == index % 2:
            clips.append(clip)
            texts.append(prompt.text)
    say(_line(MAIN.name, results.verdicts[MAIN.name]))
    if sheet is not None:
        write_sheet(clips, texts, sheet)
        if shown := results.images[:_SHOWN]:
            beside = sheet.with_stem(f"{sheet.stem}-images")
            write_sheet([one.clip for one in shown], [one.text for one in shown], beside)
    return results


def _run(pipeline: Pipeline, prompt: Prompt, variant: Variant, plan: Plan, results: Results) -> torch.Tensor:
    video = pipeline.generate(
        prompt.text,
        delivery=Delivery(container="raw", preview=False),
        seed=prompt.seed,
        num_steps=variant.num_steps,
        attention_type=variant.attention_type,
        sla_topk=variant.sla_topk,
        num_frames=plan.num_frames,
    )
    clip = torch.from_numpy(video.frames)
    stages = video.report["stages"]
    assert isinstance(stages, dict)
    verdict = judge(prompt.scene, measure(clip, num_subjects=len(prompt.scene.actors)))
    results.add(variant.name, verdict, float(stages["denoiser"]["milliseconds"]))
    return clip


@torch.no_grad()
def _run_teacher(settings: Settings, prompts: Sequence[Prompt], plan: Plan, results: Results) -> None:
    """The teacher beside the student: fifty steps with guidance, dense attention."""
    assert settings.checkpoint_dir is not None
    model = settings.served_model
    path = settings.checkpoint_dir / f"{model.dit_files[0][0]}-teacher.safetensors"
    layout = DenoiserLayout(model.dit, quant_linear=False)
    net = layout.load(open_checkpoint(path), device=settings.device, dtype=torch.float32)
    texts, decoder = load_text_encoder(settings), load_vae_decoder(settings)
    shape = make_parameters(model, {"NUM_FRAMES": plan.num_frames}, seed=1).latent_shape

    # The served encoder refuses the empty prompt, which guidance needs.
    empty = tuple(texts._tokenizer.encode(""))
    nothing = _as_batch(texts._run([empty])[empty], settings)
    for prompt in prompts:
        started = time.perf_counter()
        (encoded,) = texts.encode([prompt.text])
        assert isinstance(encoded, EncodedPrompt)
        condition = Condition(_as_batch(encoded.embeddings[: encoded.length], settings))
        noise = draw_noise(prompt.seed, 0, (model.dit.out_channels, *shape))[None].to(settings.device)
        latents = sample_teacher(velocity_of(net), noise, condition, nothing, num_steps=_TEACHER_STEPS)
        milliseconds = 1000 * (time.perf_counter() - started)
        request = DecodeRequest(
            latents=latents[0].cpu(), report={"stages": {}, "parameters": {}}, delivery=Delivery(container="raw")
        )
        *_, (_, video) = decoder.decode({0: request})
        assert isinstance(video, DecodedVideo)
        measured = measure(torch.from_numpy(video.frames), num_subjects=len(prompt.scene.actors))
        results.add("teacher", judge(prompt.scene, measured), milliseconds)


def _as_batch(rows: torch.Tensor, settings: Settings) -> TextBatch:
    """Embeddings [L, C] of one text."""
    return TextBatch(rows[None].to(settings.device), torch.tensor([len(rows)], device=settings.device))


def _measure_vae(settings: Settings, plan: Plan) -> Iterator[float]:
    """PSNR of held-out clips through encoder and decoder."""
    vae: WanVAE = load_vae_decoder(settings)._vae
    generator = random.Random(77)
    for _ in range(plan.num_psnr_clips):
        clip = render([sample_scene(generator, held_out=True)], num_frames=plan.num_frames)
        frames = vae.decode(vae.encode(to_video(clip).to(settings.device)))
        yield psnr(clip[0], to_clip(frames[0]).cpu())


def _line(name: str, verdicts: Sequence[Verdict]) -> str:
    accuracies = tally(verdicts)
    return f"{name} ({len(verdicts)} clips): " + ", ".join(
        f"{attribute} {accuracies[attribute].percent:.0f}%" for attribute in TARGETS
    )


def mean_accuracy(verdicts: Sequence[Verdict]) -> float:
    """Mean over the attributes that have a target, in percent."""
    accuracies = tally(verdicts)
    return sum(accuracies[name].percent for name in TARGETS) / len(TARGETS)


def summarize(results: Results, *, recorded_teacher: Mapping[str, float] | None = None) -> dict[str, object]:
    """Figures with value, target and `met`, and `met` of all together.

    Args:
        recorded_teacher: accuracies of the teacher in percent, measured where the model was trained; used if the
            teacher was not measured now.
    """
    figures: dict[str, dict[str, object]] = {}

    def figure(name: str, value: float, target: str, met: bool, clips: int) -> None:
        figures[name] = {"value": round(value, 2), "target": target, "met": met, "clips": clips}

    main = results.verdicts[MAIN.name]
    accuracies = tally(main)
    for name, target in TARGETS.items():
        value = accuracies[name].percent
        figure(f"{name} %", value, f">= {target:g}", value >= target, len(main))
    by_language = {
        language: [verdict for verdict, spoken in zip(main, results.languages, strict=True) if spoken == language]
        for language in ("en", "zh")
    }
    if all(by_language.values()):
        gap = mean_accuracy(by_language["en"]) - mean_accuracy(by_language["zh"])
        figure("English over Chinese, points", gap, "<= 3", gap <= 3, len(main))
    for better, worse, name, points in (
        (MAIN, _TWO_STEPS, "4 steps over 2, points", 10),
        (MAIN, _INT8, "int8 off over on, points", 1),
        (_DENSE, MAIN, "original over sagesla, points", 2),
    ):
        one, other = (results.verdicts.get(variant.name, []) for variant in (better, worse))
        count = min(len(one), len(other))
        if count:
            loss = mean_accuracy(one[:count]) - mean_accuracy(other[:count])
            figure(name, loss, f"<= {points}", loss <= points, count)
    teacher = _teacher_accuracies(results, recorded_teacher)
    for name, value in teacher.items():
        reference = main[: len(results.verdicts["teacher"])] if "teacher" in results.verdicts else main
        loss = value - tally(reference)[name].percent
        figure(f"teacher over student, {name}, points", loss, "<= 4", loss <= 4, len(reference))
    if results.psnr:
        value = sum(results.psnr) / len(results.psnr)
        figure("VAE PSNR, dB", value, f">= {_PSNR_TARGET:g}", value >= _PSNR_TARGET, len(results.psnr))
    if results.images:
        value, motions = _mean_first_frame(results), [right for one in results.images for right in one.motions]
        count, target = len(results.images), _FIRST_FRAME_TARGET
        figure("I2V first frame, dB", value, f">= {target:g}", value >= target, count)
        value, target = 100 * sum(motions) / len(motions), _IMAGE_MOTION_TARGET
        figure("I2V motion %", value, f">= {target:g}", value >= target, count)
    return {
        "figures": figures,
        "speedup": _speedup(results),
        "by subjects": {name: _round(accuracies) for name, accuracies in tally_by_subjects(main).items()},
        "variants": {name: _percentages(verdicts) for name, verdicts in results.verdicts.items()},
        "met": all(bool(one["met"]) for one in figures.values()),
    }


def _mean_first_frame(results: Results) -> float:
    return sum(one.first_frame for one in results.images) / len(results.images)


def _percentages(verdicts: Sequence[Verdict]) -> dict[str, float]:
    return {**_round(tally(verdicts)), "clips": len(verdicts)}


def _round(accuracies: Mapping[str, Accuracy]) -> dict[str, float]:
    return {name: round(accuracies[name].percent, 1) for name in (*TARGETS, "camera")}


def _teacher_accuracies(results: Results, recorded: Mapping[str, float] | None) -> dict[str, float]:
    if "teacher" in results.verdicts:
        accuracies = tally(results.verdicts["teacher"])
        return {name: accuracies[name].percent for name in TARGETS}
    return {name: float(recorded[name]) for name in TARGETS} if recorded else {}


def _speedup(results: Results) -> dict[str, object]:
    """Denoising time of fifty guided steps over four steps of the student; derived if the teacher did not run."""

    def median(values: Sequence[float]) -> float:
        return sorted(values)[len(values) // 2]

    student = median(results.milliseconds[MAIN.name])
    dense = results.milliseconds.get(_DENSE.name)
    if "teacher" in results.milliseconds:
        teacher, how = median(results.milliseconds["teacher"]), "measured"
    elif dense:
        teacher, how = median(dense) / 4 * 2 * _TEACHER_STEPS, "from dense steps of the student"
    else:
        return {}
    return {
        "value": round(teacher / student, 1),
        "teacher_ms": round(teacher),
        "student_ms": round(student),
        "how": how,
    }


def read_recorded_teacher(folder: Path) -> dict[str, float] | None:
    """`teacher.json` beside the weights, as `--teacher` writes it."""
    path = folder / "teacher.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_recorded_teacher(folder: Path, results: Results) -> None:
    """Keeps the teacher's accuracies for measurements that cannot afford it."""
    text = json.dumps(_percentages(results.verdicts["teacher"]), indent=2)
    (folder / "teacher.json").write_text(text + "\n", encoding="utf-8")
