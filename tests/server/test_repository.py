"""The run-time repository that the launcher renders from the committed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_backend.config import MODELS
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
    rendered = render_repository(committed, MODELS[model], tmp_path / "models")
    assert {path.name for path in rendered.iterdir()} == expected
    for name in expected:
        assert (rendered / name / "config.pbtxt").read_bytes() == (committed / name / "config.pbtxt").read_bytes()
        assert (rendered / name / "1").is_dir()


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    committed = tmp_path / "committed"
    for name in ("text_to_video", "text_encoder"):
        (committed / name).mkdir(parents=True)
        source = find_model_repository() / name / "config.pbtxt"
        (committed / name / "config.pbtxt").write_bytes(source.read_bytes())
    with pytest.raises(Misconfigured, match="has no denoiser, which tiny needs"):
        render_repository(committed, MODELS["tiny"], tmp_path / "models")
    with pytest.raises(Misconfigured, match="image_to_video"):
        render_repository(committed, MODELS["tiny-I2V"], tmp_path / "more")
