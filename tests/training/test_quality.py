"""The quality command: prompts, figures beside targets, and one real pass through the stages that serve."""

from __future__ import annotations

from pathlib import Path

import torch

from turbo_backend.checkpoints import tiny_checkpoint_folder
from turbo_backend.pipeline import Pipeline
from turbo_backend.settings import Settings
from turbo_training.image_quality import ImageVerdict, measure_image_to_video
from turbo_training.judge import ATTRIBUTES
from turbo_training.quality import MAIN, VARIANTS, Plan, Results, Variant, draw_prompts, run_quality, summarize
from turbo_training.scene import is_held_out


def verdict(is_right: bool) -> dict[str, list[bool]]:
    return {name: [is_right] for name in ATTRIBUTES}


def filled(right_of_ten: dict[str, int]) -> Results:
    results = Results(languages=["en", "zh"] * 5, psnr=[31.0, 33.0])
    for name, right in right_of_ten.items():
        for i in range(10):
            results.add(name, verdict(i < right), 100.0)
    return results


def test_prompts_are_held_out_and_in_two_languages() -> None:
    prompts = draw_prompts(20)
    assert all(is_held_out(prompt.scene) for prompt in prompts)
    english, chinese = prompts[::2], prompts[1::2]
    assert all(prompt.text.isascii() for prompt in english)
    assert not any(prompt.text.isascii() for prompt in chinese)
    assert [(one.scene, one.seed) for one in english] == [(one.scene, one.seed) for one in chinese]
    assert len({prompt.seed for prompt in prompts}) == 10
    assert prompts == draw_prompts(20)
    assert len({variant.name for variant in (MAIN, *VARIANTS)}) == 1 + len(VARIANTS)
    several = [len(prompt.scene.actors) for prompt in draw_prompts(400)]
    assert 0.1 < several.count(2) / 400 < 0.3


def test_figures_stand_beside_their_targets() -> None:
    names = {variant.name: 10 for variant in (MAIN, *VARIANTS)}
    good = summarize(filled(names), recorded_teacher=dict.fromkeys(ATTRIBUTES, 100.0))
    assert good["met"] is True
    assert good["figures"]["VAE PSNR, dB"]["value"] == 32.0  # type: ignore[index]
    assert good["speedup"]["value"] == 25.0  # type: ignore[index]
    worse = summarize(filled({**names, Variant(num_steps=2).name: 5}))
    figures = worse["figures"]
    assert isinstance(figures, dict)
    assert worse["met"] is False
    assert [name for name, figure in figures.items() if not figure["met"]] == ["4 steps over 2, points"]


def test_two_subjects_are_told_apart_from_one() -> None:
    results = filled({MAIN.name: 10})
    two = {name: [True, False] for name in ATTRIBUTES}
    results.verdicts[MAIN.name] = [verdict(True)] * 8 + [two] * 2
    apart = summarize(results)["by subjects"]
    assert isinstance(apart, dict)
    assert {name: accuracies["motion"] for name, accuracies in apart.items()} == {
        "one subject": 100.0,
        "two subjects": 50.0,
    }


def test_languages_are_compared() -> None:
    results = filled({MAIN.name: 10})
    results.verdicts[MAIN.name] = [verdict(language == "en") for language in results.languages]
    figures = summarize(results)["figures"]
    assert isinstance(figures, dict)
    assert figures["English over Chinese, points"] == {"value": 100.0, "target": "<= 3", "met": False, "clips": 10}


def test_image_to_video_has_figures_of_its_own() -> None:
    results = filled({MAIN.name: 10})
    results.images = [
        ImageVerdict(text="", clip=torch.empty(0), first_frame=first_frame, motions=motions)
        for first_frame, motions in ((29.0, (True, True)), (30.0, (False,)))
    ]
    figures = summarize(results)["figures"]
    assert isinstance(figures, dict)
    assert figures["I2V first frame, dB"] == {"value": 29.5, "target": ">= 28", "met": True, "clips": 2}
    assert figures["I2V motion %"] == {"value": 66.67, "target": ">= 85", "met": False, "clips": 2}


def test_one_image_through_the_stages() -> None:
    pipeline = Pipeline.from_settings(Settings.from_environment({"TURBO_DEVICE": "cpu", "TURBO_MODEL": "tiny-I2V"}))
    (verdict,) = measure_image_to_video(pipeline, num_prompts=1, num_frames=5)
    assert 0 < verdict.first_frame < 60
    assert len(verdict.motions) in (1, 2)


def test_one_prompt_through_the_stages(tmp_path: Path) -> None:
    plan = Plan(
        num_prompts=2,
        num_compared_prompts=1,
        num_psnr_clips=1,
        num_image_prompts=1,
        num_frames=5,
        variants=VARIANTS[:1],
    )
    lines: list[str] = []
    results = run_quality(tiny_checkpoint_folder(), plan, sheet=tmp_path / "sheet.png", say=lines.append)
    assert [len(verdicts) for verdicts in results.verdicts.values()] == [1, 2]
    summary = summarize(results)
    assert set(summary) == {"by subjects", "figures", "speedup", "variants", "met"}
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["sheet-images.png", "sheet.png"]
    assert [line.split()[0] for line in lines] == ["VAE:", "2", "image-to-video", "4"]
    assert len(results.images) == 1
