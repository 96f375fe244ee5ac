"""Settings: read from the environment, refused by name, given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbo_backend.config import MODELS
from turbo_backend.errors import Misconfigured
from turbo_backend.settings import Settings, list_variables, unknown_variables


def test_defaults_serve_the_tiny_model() -> None:
    settings = Settings.from_environment({})
    assert settings.served_model is MODELS["tiny"]
    assert settings.weights == "checkpoint"
    assert not settings.quant_linear
    assert settings.to_environment() == {}


def test_an_empty_variable_counts_as_unset() -> None:
    assert Settings.from_environment({"TURBO_MODEL": "", "TURBO_NUM_THREADS": " "}) == Settings.from_environment({})


def test_settings_survive_the_environment(tmp_path: Path) -> None:
    high, low = tmp_path / "high.pth", tmp_path / "low.pth"
    high.touch()
    low.touch()
    environment = {
        "TURBO_MODEL": "Wan2.2-A14B",
        "TURBO_ENSEMBLE": "image_to_video_a14b",
        "TURBO_CHECKPOINT_DIR": str(tmp_path),
        "TURBO_DIT_CHECKPOINT": f"{high}:{low}",
        "TURBO_WEIGHTS": "random",
        "TURBO_ATTENTION_PROVIDER": "triton",
        "TURBO_QUANT_LINEAR": "true",
        "TURBO_DEVICE": "cuda:1",
        "TURBO_DTYPE": "float16",
        "TURBO_TEXT_ENCODER_DEVICE": "cpu",
        "TURBO_QUANT_TEXT_ENCODER": "true",
        "TURBO_GPU_MEMORY_GIB": "40.5",
        "TURBO_NUM_THREADS": "3",
        "TURBO_TEXT_CACHE_ENTRIES": "0",
        "TURBO_IMAGE_CACHE_ENTRIES": "3",
        "TURBO_EXPERT_PLACEMENT": "swapped",
        "TURBO_MAX_BATCH_SIZE": "2",
        "TURBO_BATCH_INVARIANT": "false",
        "TURBO_RECORD_FORWARDS": "true",
        "TURBO_MAX_QUEUE_SIZE": "9",
        "TURBO_JOB_STORE": "s3://bucket/jobs",
        "TURBO_JOB_CONCURRENCY": "3",
        "TURBO_JOB_RESUME": "false",
        "TURBO_JOB_ATTEMPTS": "5",
        "TURBO_JOB_MAX_AGE_HOURS": "1.5",
        "TURBO_JOB_MAX_BYTES": "2000000",
    }
    settings = Settings.from_environment(environment)
    assert settings.dit_checkpoint == (high, low)
    assert settings.to_environment() == environment
    assert settings.gpu_memory == 81 * 2**29
    assert sorted(environment) == sorted(variable.name for variable in list_variables())


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("on", True), ("0", False), ("FALSE", False)])
def test_booleans_are_read_in_their_usual_spellings(text: str, value: bool) -> None:
    assert Settings.from_environment({"TURBO_QUANT_LINEAR": text}).quant_linear is value


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("TURBO_MODEL", "tiny,tiny", "each model once"),
        ("TURBO_MODEL", "tiny,Wan2.1-1.3B", "models with the same text encoder and VAE, unlike tiny and Wan2.1-1.3B"),
        ("TURBO_MODEL", ",", "one of tiny, tiny-I2V, Wan2.1-1.3B, Wan2.1-14B, Wan2.2-A14B"),
        ("TURBO_ENSEMBLE", "Video 2", "lower-case letters, digits and _"),
        ("TURBO_MODEL", "Wan9", "one of tiny, tiny-I2V, Wan2.1-1.3B, Wan2.1-14B, Wan2.2-A14B"),
        ("TURBO_CHECKPOINT_DIR", "/nowhere/at/all", "an existing folder"),
        ("TURBO_DIT_CHECKPOINT", "/nowhere/a.pth", "existing files (/nowhere/a.pth is not there)"),
        ("TURBO_WEIGHTS", "none", "checkpoint or random"),
        ("TURBO_ATTENTION_PROVIDER", "cuda", "auto, reference, triton or spargeattn"),
        ("TURBO_QUANT_LINEAR", "maybe", "true or false"),
        ("TURBO_DEVICE", "gpu", "auto, cpu, cuda or cuda:N"),
        ("TURBO_DEVICE", "cuda:", "auto, cpu, cuda or cuda:N"),
        ("TURBO_DTYPE", "int8", "auto, float32, bfloat16 or float16"),
        ("TURBO_TEXT_ENCODER_DEVICE", "cuda", "auto or cpu"),
        ("TURBO_EXPERT_PLACEMENT", "host", "auto, resident, spread or swapped"),
        ("TURBO_IMAGE_CACHE_ENTRIES", "-1", "greater than or equal to 0"),
        ("TURBO_NUM_THREADS", "-1", "greater than or equal to 0"),
        ("TURBO_NUM_THREADS", "two", "an integer"),
        ("TURBO_TEXT_CACHE_ENTRIES", "1.5", "an integer"),
        ("TURBO_MAX_BATCH_SIZE", "9", "less than or equal to 8"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: str, fits: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        Settings.from_environment({name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} = {value!r}: must be ")
    assert message.endswith(fits)


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(Misconfigured, match=r"TURBO_MODEL.*; TURBO_DTYPE"):
        Settings.from_environment({"TURBO_MODEL": "x", "TURBO_DTYPE": "y"})


def test_a_published_model_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"TURBO_CHECKPOINT_DIR is not set: Wan2\.1-14B"):
        Settings.from_environment({"TURBO_MODEL": "Wan2.1-14B"})
    assert Settings.from_environment({"TURBO_MODEL": "Wan2.1-14B", "TURBO_WEIGHTS": "random"}).checkpoint_dir is None


def test_explicit_files_must_match_the_experts(tmp_path: Path) -> None:
    file = tmp_path / "one.pth"
    file.touch()
    with pytest.raises(Misconfigured, match=r"names 2 file\(s\): tiny has 1 expert"):
        Settings.from_environment({"TURBO_DIT_CHECKPOINT": f"{file}:{file}"})


def test_several_models_are_separated_by_commas(tmp_path: Path) -> None:
    settings = Settings.from_environment({"TURBO_MODEL": "tiny, tiny-I2V"})
    assert settings.served_models == (MODELS["tiny"], MODELS["tiny-I2V"])
    assert settings.served_model is MODELS["tiny"]
    assert settings.to_environment() == {"TURBO_MODEL": "tiny,tiny-I2V"}
    file = tmp_path / "net.pth"
    file.touch()
    with pytest.raises(Misconfigured, match="TURBO_DIT_CHECKPOINT names the files of one model, and 2 are served"):
        Settings.from_environment({"TURBO_MODEL": "tiny,tiny-I2V", "TURBO_DIT_CHECKPOINT": str(file)})


def test_views_resolve_for_the_cpu() -> None:
    settings = Settings.from_environment({"TURBO_DEVICE": "cpu"})
    assert settings.device == torch.device("cpu")
    assert settings.dtype is torch.float32
    assert settings.provider == "reference"
    assert settings.threads >= 1
    chosen = {"TURBO_DTYPE": "bfloat16", "TURBO_ATTENTION_PROVIDER": "triton", "TURBO_NUM_THREADS": "7"}
    settings = Settings.from_environment({"TURBO_DEVICE": "cpu", **chosen})
    assert settings.dtype is torch.bfloat16
    assert settings.provider == "triton"
    assert settings.threads == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_views_resolve_for_the_gpu() -> None:
    settings = Settings.from_environment({})
    assert settings.device == torch.device("cuda", 0)
    assert settings.dtype is torch.bfloat16
    assert settings.provider == "triton"


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(Misconfigured, match="TURBO_DEVICE = 'cuda:99'"):
        _ = Settings.from_environment({"TURBO_DEVICE": "cuda:99"}).device


def test_misspelt_variables_are_remarked_on() -> None:
    remarks = unknown_variables({"TURBO_MODLE": "tiny", "TURBO_CHAT_SERVICE_HOST": "10.0.0.1", "PATH": "/bin"})
    assert remarks == ["TURBO_MODLE is not read by this server; did you mean TURBO_MODEL?"]
