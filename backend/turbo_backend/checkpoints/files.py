"""Finding the files of a model in a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_backend.checkpoints.published import published_files
from turbo_backend.config import ModelConfig
from turbo_backend.errors import CheckpointError

#: Tried in this order: a converted file is quicker to map than the published one.
SUFFIXES = (".safetensors", ".safetensors.index.json", ".pth")

#: Either of these makes a folder a tokenizer's.
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where the parts of one model are.

    Attributes:
        dit: one file for each expert, the high-noise one first.
        text_encoder: weights of the text encoder.
        vae: weights of the VAE.
        tokenizer: folder with `tokenizer.json` or `spiece.model`.
    """

    dit: tuple[Path, ...]
    text_encoder: Path
    vae: Path
    tokenizer: Path


def find_files(
    model: ModelConfig, folder: Path, *, quant_linear: bool, dit: Sequence[Path] | None = None
) -> ModelFiles:
    """The files of `model` in `folder`, by their published names with any supported suffix.

    With `quant_linear` the `-quant` files are taken; where there is none, the plain file, which the loader then
    quantizes with the formula that made the published ones. Where a model has interchangeable denoisers (14B at 720p
    or 480p), the first one present is taken.

    Args:
        model: what to look for.
        folder: the checkpoint folder.
        quant_linear: prefer the quantized denoisers.
        dit: denoiser files to take instead of those looked for, one for each expert.

    Raises:
        CheckpointError: names every absent file and says how to get them.
    """
    absent: list[str] = []
    found_dit = list(dit or ())
    if dit is not None and len(dit) != model.num_experts:
        raise CheckpointError(f"{model.name} has {model.num_experts} denoiser file(s), {len(dit)} given")
    absent += [str(path) for path in found_dit if not path.exists()]
    for names in () if dit is not None else model.dit_files:
        wanted = [f"{name}-quant" for name in names] + list(names) if quant_linear else list(names)
        found = find_weights(folder, *wanted)
        if found is None:
            absent.append(f"{wanted[0]}.pth or .safetensors")
        else:
            found_dit.append(found)
    text_encoder = find_weights(folder, model.text_encoder_file)
    if text_encoder is None:
        absent.append(f"{model.text_encoder_file}.pth or .safetensors")
    vae = find_weights(folder, model.vae_file)
    if vae is None:
        absent.append(f"{model.vae_file}.pth or .safetensors")
    tokenizer = folder / model.tokenizer
    if not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
        absent.append(f"{model.tokenizer}/ with {' or '.join(TOKENIZER_FILES)}")
    if absent or text_encoder is None or vae is None:
        each = list(dict.fromkeys(absent))  # experts may share a file
        raise CheckpointError(_explain(model, folder, each, quant_linear=quant_linear))
    return ModelFiles(dit=tuple(found_dit), text_encoder=text_encoder, vae=vae, tokenizer=tokenizer)


def find_weights(folder: Path, *names: str) -> Path | None:
    """The first of `names` that is there with a known suffix."""
    for name in names:
        for suffix in SUFFIXES:
            path = folder / (name + suffix)
            if path.exists() or path.is_symlink():
                return path
    return None


def _explain(model: ModelConfig, folder: Path, absent: list[str], *, quant_linear: bool) -> str:
    if not folder.is_dir():
        beginning = f"{folder}: no such folder; {model.name} needs"
    else:
        beginning = f"{folder}: {len(absent)} file{'s' if len(absent) > 1 else ''} of {model.name} absent:"
    message = "\n  ".join([beginning, *absent])
    if published_files(model, quant_linear=quant_linear):
        option = " --quant-linear" if quant_linear else ""
        message += (
            "\n  get them with: turbodiffusion-server weights "
            f"{model.name}{option} --checkpoint-dir {folder} --download"
        )
    return message
