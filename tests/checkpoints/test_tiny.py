"""The embedded tiny models' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbo_backend.checkpoints import (
    DenoiserLayout,
    TextEncoderLayout,
    VAELayout,
    find_files,
    inspect_file,
    open_checkpoint,
    tiny_checkpoint_folder,
)
from turbo_backend.config import MODELS, ModelConfig
from turbo_backend.errors import CheckpointError
from turbo_backend.tokenizer import Tokenizer

TINY = MODELS["tiny"]


@pytest.mark.parametrize("model", [MODELS["tiny"], MODELS["tiny-I2V"]], ids=lambda model: model.name)
def test_loads_through_the_same_loader(model: ModelConfig) -> None:
    files = find_files(model, tiny_checkpoint_folder(), quant_linear=False)
    for dit in files.dit:
        checkpoint = open_checkpoint(dit)
        assert checkpoint.dtype("patch_embedding.weight") == torch.bfloat16
        for quant_linear in (False, True):
            DenoiserLayout(model.dit, quant_linear=quant_linear).load(checkpoint, device="cpu", dtype=torch.float32)
    TextEncoderLayout(model.text_encoder).load(open_checkpoint(files.text_encoder), device="cpu", dtype=torch.float32)
    VAELayout(model.vae).load(open_checkpoint(files.vae), device="cpu", dtype=torch.float32)
    assert Tokenizer.from_folder(files.tokenizer).encode("a cat")
    for path in (*files.dit, files.text_encoder, files.vae):
        found = inspect_file(path, values=True)
        assert found.models == ((model.name,) if path in files.dit else ("tiny", "tiny-I2V"))
        assert found.problems == ()


def test_size_of_what_is_shipped() -> None:
    """Both models together, tokenizer included, stay under 24 MiB; the teacher is for the quality command alone."""
    paths = [path for path in tiny_checkpoint_folder().rglob("*") if path.is_file() and "teacher" not in path.name]
    assert len(paths) >= 5
    assert sum(path.stat().st_size for path in paths) <= 24 * 2**20


def test_every_absent_file_is_named(tmp_path: Path) -> None:
    model = MODELS["Wan2.2-A14B"]
    with pytest.raises(CheckpointError) as caught:
        find_files(model, tmp_path, quant_linear=True)
    text = str(caught.value)
    for part in (
        "TurboWan2.2-I2V-A14B-high-720P-quant.pth",
        "TurboWan2.2-I2V-A14B-low-720P-quant.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/ with tokenizer.json or spiece.model",
        f"weights Wan2.2-A14B --quant-linear --checkpoint-dir {tmp_path} --download",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("present", "quant_linear", "expected"),
    [
        (["TurboWan2.1-T2V-14B-480P.pth"], False, "TurboWan2.1-T2V-14B-480P.pth"),
        (["TurboWan2.1-T2V-14B-480P.pth", "TurboWan2.1-T2V-14B-720P.pth"], False, "TurboWan2.1-T2V-14B-720P.pth"),
        (
            ["TurboWan2.1-T2V-14B-720P.pth", "TurboWan2.1-T2V-14B-480P-quant.pth"],
            True,
            "TurboWan2.1-T2V-14B-480P-quant.pth",
        ),
        (["TurboWan2.1-T2V-14B-720P.pth"], True, "TurboWan2.1-T2V-14B-720P.pth"),
        (
            ["TurboWan2.1-T2V-14B-720P.pth", "TurboWan2.1-T2V-14B-720P.safetensors.index.json"],
            False,
            "TurboWan2.1-T2V-14B-720P.safetensors.index.json",
        ),
    ],
)
def test_which_denoiser_is_taken(tmp_path: Path, present: list[str], quant_linear: bool, expected: str) -> None:
    for name in [*present, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.safetensors", "google/umt5-xxl/spiece.model"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = find_files(MODELS["Wan2.1-14B"], tmp_path, quant_linear=quant_linear)
    assert [path.name for path in files.dit] == [expected]
    assert files.text_encoder.suffix == ".safetensors"


def test_chosen_denoiser_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder()
    (chosen,) = find_files(TINY, folder, quant_linear=False).dit
    assert find_files(TINY, folder, quant_linear=False, dit=[chosen]).dit == (chosen,)
    with pytest.raises(CheckpointError, match=r"mine\.pth"):
        find_files(TINY, folder, quant_linear=False, dit=[tmp_path / "mine.pth"])
    with pytest.raises(CheckpointError, match="1 denoiser file"):
        find_files(TINY, folder, quant_linear=False, dit=[chosen, chosen])
