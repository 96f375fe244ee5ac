"""The run-time repository that the launcher renders from the committed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from turbo_backend.config import MODELS, name_ensembles
from turbo_backend.errors import Misconfigured
from turbo_backend.server.repository import find_model_repository, render_repository

STEPS = {"text_encoder", "denoiser", "vae_decoder", "jobs"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny", STEPS | {"text_to_video"}),
        ("Wan2.1-14B", STEPS | {"text_to_video"}),
        ("tiny-I2V", STEPS | {"image_encoder", "image_to_video"}),
        ("Wan2.2-A14B", STEPS | {"image_encoder", "image_to_video"}),
    ],
)
def test_one_network_takes_its_ensemble_and_the_steps_of_it(tmp_path: Path, model: str, expected: set[str]) -> None:
    committed = find_model_repository()
    rendered = render_repository(committed, [MODELS[model]], tmp_path / "models")
    assert {path.name for path in rendered.iterdir()} == expected
    for name in expected:
        assert (rendered / name / "config.pbtxt").read_bytes() == (committed / name / "config.pbtxt").read_bytes()
        assert (rendered / name / "1").is_dir()


def test_several_networks_share_text_encoder_and_vae(tmp_path: Path) -> None:
    models = [MODELS[name] for name in ("Wan2.1-1.3B", "Wan2.1-14B", "Wan2.2-A14B")]
    rendered = render_repository(find_model_repository(), models, tmp_path / "models")
    configs = {
        path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        for path in rendered.glob("*/config.pbtxt")
    }
    assert set(configs) == {
        "text_encoder", "vae_decoder", "text_to_video", "denoiser", "text_to_video_14b", "denoiser_14b",
        "image_to_video", "image_encoder", "denoiser_a14b", "jobs",
    }  # fmt: skip
    ensembles = name_ensembles(models)
    assert {name: model.name for name, model in ensembles.items()} == {
        name: configs[name.replace("text_to_video", "denoiser").replace("image_to_video", "image_encoder")]
        .parameters["TURBO_MODEL"]
        .string_value
        for name in ensembles
    }
    assert all(config.name == name for name, config in configs.items())
    steps = {
        name: [step.model_name for step in config.ensemble_scheduling.step]
        for name, config in configs.items()
        if config.platform == "ensemble"
    }
    assert steps == {
        "text_to_video": ["text_encoder", "denoiser", "vae_decoder"],
        "text_to_video_14b": ["text_encoder", "denoiser_14b", "vae_decoder"],
        "image_to_video": ["text_encoder", "image_encoder", "denoiser_a14b", "vae_decoder"],
    }
    told = {
        name: {key: value.string_value for key, value in configs[name].parameters.items()}
        for name in ("text_encoder", "denoiser", "denoiser_14b", "image_encoder")
    }
    assert told == {
        "text_encoder": {},
        "denoiser": {"TURBO_MODEL": "Wan2.1-1.3B", "TURBO_ENSEMBLE": "text_to_video"},
        "denoiser_14b": {"TURBO_MODEL": "Wan2.1-14B", "TURBO_ENSEMBLE": "text_to_video_14b"},
        "image_encoder": {"TURBO_MODEL": "Wan2.2-A14B", "TURBO_ENSEMBLE": "image_to_video"},
    }


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    committed = tmp_path / "committed"
    for name in ("text_to_video", "text_encoder"):
        (committed / name).mkdir(parents=True)
        source = find_model_repository() / name / "config.pbtxt"
        (committed / name / "config.pbtxt").write_bytes(source.read_bytes())
    with pytest.raises(Misconfigured, match="has no denoiser, which tiny needs"):
        render_repository(committed, [MODELS["tiny"]], tmp_path / "models")
    with pytest.raises(Misconfigured, match="image_to_video"):
        render_repository(committed, [MODELS["tiny-I2V"]], tmp_path / "more")
