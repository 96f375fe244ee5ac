"""Trained networks to files in the published layout, for the ordinary loader, and back into a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from turbo_backend.checkpoints.writer import Replacing, write_safetensors
from turbo_backend.config import ModelConfig
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.nets.vae import WanVAE
from turbo_training.trainer import is_done


def export_weights(
    model: ModelConfig,
    folder: Path,
    *,
    denoisers: Mapping[str, WanDiT],
    text_encoder: UMT5Encoder,
    vae: WanVAE,
    tokenizer: Path,
    source: str,
) -> None:
    """Writes a folder that `TURBO_CHECKPOINT_DIR` takes.

    Linears and embeddings are bfloat16, small tensors that are computed with in float32 stay float32, the VAE is
    bfloat16.

    Args:
        model: gives the names of the other files.
        denoisers: by the name of their file; teachers have names of their own, for the quality command.
        tokenizer: folder of `tokenizer.json`.
        source: how the weights were made, for the files' headers.
    """
    small = tuple(part for part in KEEP_FP32 if part not in ("time_embedding.", "time_projection.", "head."))
    for name, denoiser in denoisers.items():
        _write(denoiser, folder / f"{name}.safetensors", small, source)
    _write(text_encoder, folder / f"{model.text_encoder_file}.safetensors", ("norm",), source)
    _write(vae, folder / f"{model.vae_file}.safetensors", ("gamma", "bias"), source)
    (folder / model.tokenizer).mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer / "tokenizer.json", folder / model.tokenizer / "tokenizer.json")


def import_weights(model: ModelConfig, weights: Path, folder: Path) -> None:
    """Makes a run whose stages `vae`, `text` and `teacher` are done from what `export_weights` wrote.

    Args:
        weights: folder of the exported files, the teacher's among them.
        folder: of the run; what it has already stays as it is.

    Raises:
        FileNotFoundError: a file is absent.
    """
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file():
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights / model.tokenizer / "tokenizer.json", tokenizer)
    for stage, name in (
        ("vae", model.vae_file),
        ("text", model.text_encoder_file),
        ("teacher", f"{model.dit_files[0][0]}-teacher"),
    ):
        if is_done(folder / stage):
            continue
        path = weights / f"{name}.safetensors"
        ema = {key: tensor.float() for key, tensor in load_file(path).items()}
        (folder / stage).mkdir(exist_ok=True)
        if stage == "vae":
            torch.save(ema, folder / stage / "vae.pt")
        else:
            torch.save({"modules": {"ema": ema}}, folder / stage / "checkpoint.pt")
        (folder / stage / "done").write_text(f"from {path}\n", encoding="utf-8")


def _write(network: nn.Module, path: Path, keep_fp32: tuple[str, ...], source: str) -> None:
    tensors = {
        key: tensor.detach()
        .to("cpu", torch.float32 if any(part in key for part in keep_fp32) else torch.bfloat16)
        .contiguous()
        for key, tensor in network.state_dict().items()
    }
    specs = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    with Replacing([path], force=True) as (temporary,):
        write_safetensors(temporary, specs, tensors.__getitem__, metadata={"format": "pt", "source": source})
