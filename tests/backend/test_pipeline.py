"""The pipeline in one process, with the tiny model."""

from __future__ import annotations

import pytest

from turbo_backend.errors import InvalidArgument
from turbo_backend.parameters import Delivery
from turbo_backend.pipeline import Pipeline
from turbo_backend.settings import Settings
from turbo_backend.stages.denoiser_request import DenoisedStep
from turbo_backend.stages.vae_decoder import DecodedChunk, DecodedVideo

SHORT = {"num_frames": 5, "num_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_settings(Settings.from_environment({"TURBO_DEVICE": "cpu"}))


def test_steps_then_chunks_then_the_video(pipeline: Pipeline) -> None:
    updates = list(pipeline.stream("a red fox", delivery=Delivery(preview=True), **SHORT))
    assert [type(update) for update in updates] == [DenoisedStep] * 2 + [DecodedChunk] * 2 + [DecodedVideo]
    steps = [update for update in updates if isinstance(update, DenoisedStep)]
    assert all(step.preview_latents is not None for step in steps)
    silent = list(pipeline.stream("a red fox", **SHORT))
    assert all(step.preview_latents is None for step in silent if isinstance(step, DenoisedStep))


def test_the_same_request_gives_the_same_file(pipeline: Pipeline) -> None:
    first, second = (pipeline.generate("a red fox", **SHORT) for _ in range(2))
    assert first.mp4 == second.mp4
    assert pipeline.generate("a red fox", **{**SHORT, "seed": 4}).mp4 != first.mp4
    assert pipeline.generate("a blue fox", **SHORT).mp4 != first.mp4


def test_the_report_names_every_stage(pipeline: Pipeline) -> None:
    report = pipeline.generate("a red fox", delivery=Delivery(container="raw"), **SHORT).report
    assert set(report["stages"]) == {"text_encoder", "denoiser", "vae_decoder", "video_encoder"}  # type: ignore[call-overload]
    assert set(report["weights"]) == {"text_encoder", "denoiser", "vae"}  # type: ignore[call-overload]
    assert report["prompt"] == "a red fox"


@pytest.mark.parametrize(
    ("prompt", "values", "field"),
    [("", {}, "PROMPT"), ("a fox", {"num_steps": 9}, "NUM_STEPS"), ("a fox", {"image": b"PNG"}, "IMAGE")],
)
def test_errors_are_raised_with_their_class(
    pipeline: Pipeline, prompt: str, values: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field} = "):
        pipeline.generate(prompt, **{**SHORT, **values})  # type: ignore[arg-type]
    assert pipeline.generate("a good one", **SHORT).mp4
