"""Trained networks to files in the published layout, for the ordinary loader."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from turbo_backend.checkpoints.writer import Replacing, write_safetensors
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.nets.vae import WanVAE
from turbo_training.shapes import RunShape


def export_weights(
    shape: RunShape,
    folder: Path,
    *,
    denoiser: WanDiT,
    teacher: WanDiT,
    text_encoder: UMT5Encoder,
    vae: WanVAE,
    tokenizer: Path,
    source: str,
) -> None:
    """Writes a folder that `TURBO_CHECKPOINT_DIR` takes, and the teacher beside its student.

    Linears and embeddings are bfloat16, small tensors that are computed with in float32 stay float32, the VAE is
    bfloat16.

    Args:
        denoiser: the distilled student.
        teacher: written as `<name>-teacher`, for `TURBO_DIT_CHECKPOINT` and the quality command.
        tokenizer: folder of `tokenizer.json`.
        source: how the weights were made, for the files' headers.
    """
    model = shape.model
    (dit_name, *_), *_ = model.dit_files
    small = tuple(part for part in KEEP_FP32 if part not in ("time_embedding.", "time_projection.", "head."))
    for network, name, keep_fp32 in (
        (denoiser, dit_name, small),
        (teacher, f"{dit_name}-teacher", small),
        (text_encoder, model.text_encoder_file, ("norm",)),
        (vae, model.vae_file, ("gamma", "bias")),
    ):
        _write(network, folder / f"{name}.safetensors", keep_fp32, source)
    (folder / model.tokenizer).mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer / "tokenizer.json", folder / model.tokenizer / "tokenizer.json")


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
