"""The embedded tiny models' files: shipped, or made once."""

from __future__ import annotations

import subprocess
import sys
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
from turbo_backend.config import MODELS
from turbo_backend.errors import CheckpointError
from turbo_backend.tokenizer import Tokenizer

TINY = MODELS["tiny"]
#: Its weights are not shipped yet.
MADE = MODELS["tiny-I2V"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_three_processes_at_once_make_one_folder(cache: Path) -> None:
    script = """if True:
        from turbo_backend.checkpoints import tiny_checkpoint_folder
        from turbo_backend.config import MODELS
        print(tiny_checkpoint_folder(MODELS["tiny-I2V"]))
    """
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert outputs == {str(tiny_checkpoint_folder(MADE))}
    assert [path.name for path in (cache / "turbodiffusion").iterdir()] == [tiny_checkpoint_folder(MADE).name]


def test_is_not_made_twice() -> None:
    folder = tiny_checkpoint_folder(MADE)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert tiny_checkpoint_folder(MADE) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_loads_through_the_same_loader() -> None:
    files = find_files(TINY, tiny_checkpoint_folder(), quant_linear=False)
    (dit,) = files.dit
    checkpoint = open_checkpoint(dit)
    assert checkpoint.dtype("patch_embedding.weight") == torch.bfloat16
    for quant_linear in (False, True):
        DenoiserLayout(TINY.dit, quant_linear=quant_linear).load(checkpoint, device="cpu", dtype=torch.float32)
    TextEncoderLayout(TINY.text_encoder).load(open_checkpoint(files.text_encoder), device="cpu", dtype=torch.float32)
    VAELayout(TINY.vae).load(open_checkpoint(files.vae), device="cpu", dtype=torch.float32)
    assert Tokenizer.from_folder(files.tokenizer).encode("a cat")
    for path in (dit, files.text_encoder, files.vae):
        found = inspect_file(path, values=True)
        assert found.models == (("tiny",) if path == dit else ("tiny", "tiny-I2V"))
        assert found.problems == ()


def test_incomplete_folder_says_what_to_do(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "turbodiffusion" / tiny_checkpoint_folder(MADE).name
    broken.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"4 files of tiny-I2V absent(.|\n)*remove that folder"):
        tiny_checkpoint_folder(MADE)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "turbodiffusion").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
        tiny_checkpoint_folder(MADE)


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
