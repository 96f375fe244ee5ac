"""The files of the embedded `tiny` models: shipped with the package; a denoiser that is not is made once."""

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
from turbo_backend.checkpoints.layouts import DenoiserLayout
from turbo_backend.checkpoints.loader import network_specs
from turbo_backend.checkpoints.writer import write_safetensors
from turbo_backend.config import MODELS, ModelConfig
from turbo_backend.errors import CheckpointError

#: Raised when the same configuration must give other files.
_REVISION = 2
_SEED = 20250917

_SHIPPED = Path(turbo_backend.__file__).parent / "tiny"

_NOTE = """An embedded model of turbodiffusion-server: the text encoder, VAE and tokenizer that are shipped, and a
denoiser of random numbers drawn from a fixed seed. It makes a video without any download, but of nothing in particular.
This folder may be deleted at any time; it is made again when needed.
"""


def tiny_checkpoint_folder(model: ModelConfig = MODELS["tiny"]) -> Path:
    """Folder with an embedded model's denoisers, `tiny-umt5`, `tiny-VAE` (safetensors) and `tokenizer/`.

    Of a model whose denoiser is shipped inside the package it is `turbo_backend/tiny/`. That of any other is made in
    the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`), under a name that depends on the configuration and on what is
    shipped: a denoiser of random weights beside the shipped text encoder and VAE, which models served together share.
    It appears whole or not at all, however many processes make it at once.

    Raises:
        CheckpointError: the cache folder cannot be written.
    """
    if (_SHIPPED / f"{model.dit_files[0][0]}.safetensors").is_file():
        return _SHIPPED
    folder = _cache_folder() / f"{model.name}-{_digest(model)}"
    if not folder.is_dir():
        _make(model, folder)
    try:
        find_files(model, folder, quant_linear=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n  remove that folder: it is made again when needed") from None
    return folder


def _write(model: ModelConfig, folder: Path) -> None:
    for expert, (name, *_) in enumerate(dict.fromkeys(model.dit_files)):
        denoiser = DenoiserLayout(model.dit, quant_linear=False).build()
        _write_random(denoiser, folder / f"{name}.safetensors", seed=_SEED + expert)
    for path in _shared_files(model):
        copy = folder / path.relative_to(_SHIPPED)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    (folder / "README").write_text(_NOTE, encoding="utf-8")


def _shared_files(model: ModelConfig) -> tuple[Path, ...]:
    names = f"{model.text_encoder_file}.safetensors", f"{model.vae_file}.safetensors"
    return *(_SHIPPED / name for name in names), _SHIPPED / model.tokenizer / "tokenizer.json"


def _make(model: ModelConfig, folder: Path) -> None:
    """Makes the files in a folder of another name, then renames it: the first process to finish wins."""
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        work.mkdir(parents=True)
        _write(model, work)
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


def _write_random(network: nn.Module, path: Path, *, seed: int) -> None:
    from turbo_backend.nets.random_weights import initialize_random

    initialize_random(network, seed, device=torch.device("cpu"), dtype=torch.bfloat16)
    specs = network_specs(network)
    tensors = network.state_dict()
    metadata = {"format": "pt", "source": f"seeded random weights, seed {seed}"}
    write_safetensors(path, specs, lambda key: tensors[key].detach(), metadata=metadata)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "turbodiffusion"


def _digest(model: ModelConfig) -> str:
    digest = hashlib.sha256(repr((_REVISION, _SEED, asdict(model.dit))).encode())
    for path in _shared_files(model):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
