"""The files of the embedded `tiny` models: shipped with the package, or made once from seeded random weights."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import turbo_backend
from turbo_backend.checkpoints.files import find_files
from turbo_backend.checkpoints.layouts import DenoiserLayout, TextEncoderLayout, VAELayout
from turbo_backend.checkpoints.loader import network_specs
from turbo_backend.checkpoints.writer import write_safetensors
from turbo_backend.config import MODELS, ModelConfig
from turbo_backend.errors import CheckpointError

#: Raised when the same configuration must give other files.
_REVISION = 1
_SEED = 20250917

_NOTE = """Weights of a `tiny` model of turbodiffusion-server: random numbers drawn from a fixed seed, in the layout
of the published TurboDiffusion files. They make a video without any download, but of nothing in particular.
This folder may be deleted at any time; it is made again when needed.
"""


def tiny_checkpoint_folder(model: ModelConfig = MODELS["tiny"]) -> Path:
    """Folder with an embedded model's denoisers, `tiny-umt5`, `tiny-VAE` (safetensors) and `tokenizer/`.

    Of a model whose weights are shipped inside the package it is `turbo_backend/tiny/`. That of any other is made in
    the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`), under a name that depends on the configuration. It appears
    whole or not at all, however many processes make it at once.

    Raises:
        CheckpointError: the cache folder cannot be written.
    """
    shipped = Path(turbo_backend.__file__).parent / "tiny"
    if (shipped / f"{model.dit_files[0][0]}.safetensors").is_file():
        return shipped
    folder = _cache_folder() / f"{model.name}-{_digest(model)}"
    if not folder.is_dir():
        _make(model, folder)
    try:
        find_files(model, folder, quant_linear=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n  remove that folder: it is made again when needed") from None
    return folder


def write_tiny_checkpoint(model: ModelConfig, folder: Path) -> None:
    """Writes the files of `model` with random weights, in the published dtypes: the VAE float32, the rest bfloat16."""
    from turbo_backend.tokenizer import write_tiny_tokenizer

    for expert, (name, *_) in enumerate(dict.fromkeys(model.dit_files)):
        denoiser = DenoiserLayout(model.dit, quant_linear=False).build()
        _write_random(denoiser, folder / name, torch.bfloat16, seed=_SEED + expert)
    _write_random(TextEncoderLayout(model.text_encoder).build(), folder / model.text_encoder_file, torch.bfloat16)
    _write_random(VAELayout(model.vae).build(), folder / model.vae_file, torch.float32)
    write_tiny_tokenizer(folder / model.tokenizer)
    (folder / "README").write_text(_NOTE, encoding="utf-8")


def _make(model: ModelConfig, folder: Path) -> None:
    """Makes the files in a folder of another name, then renames it: the first process to finish wins."""
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        work.mkdir(parents=True)
        write_tiny_checkpoint(model, work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be made ({error.strerror or error}): set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_random(network: nn.Module, path: Path, dtype: torch.dtype, *, seed: int = _SEED) -> None:
    from turbo_backend.nets.random_weights import initialize_random

    initialize_random(network, seed, device=torch.device("cpu"), dtype=dtype)
    specs = network_specs(network)
    tensors = network.state_dict()
    metadata = {"format": "pt", "source": f"seeded random weights, seed {seed}"}
    write_safetensors(
        path.with_name(path.name + ".safetensors"), specs, lambda key: tensors[key].detach(), metadata=metadata
    )


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "turbodiffusion"


def _digest(model: ModelConfig) -> str:
    text = repr((_REVISION, _SEED, asdict(model.dit), asdict(model.text_encoder), asdict(model.vae), model.tokenizer))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
