"""Saying what a weight file is and whether anything is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from turbo_backend.checkpoints.layouts import checkpoint_specs, layout_of
from turbo_backend.checkpoints.reader import Checkpoint, open_checkpoint
from turbo_backend.checkpoints.recognise import recognise
from turbo_backend.config import MODELS
from turbo_backend.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSummary:
    """One tensor as the file has it."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `inspect_file` found; `problems` is empty when the file can be served as it is."""

    path: str
    file_format: str
    files: tuple[str, ...]
    file_bytes: int
    kind: str
    description: str
    models: tuple[str, ...]
    quantized: bool
    num_tensors: int
    tensor_bytes: int
    dtypes: dict[str, int]
    metadata: dict[str, str]
    sha256: str | None
    problems: tuple[str, ...]
    tensors: tuple[TensorSummary, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def inspect_file(path: Path, *, sha256: bool = False, values: bool = False) -> Inspection:
    """Opens a weight file, says what it is, and compares it with the published layout of the same sizes.

    Args:
        path: a `.pth`, `.safetensors` or `.safetensors.index.json`.
        sha256: also take the fingerprint, which reads the whole file.
        values: also look for values that are not finite, which reads the whole file.

    Raises:
        CheckpointError: it cannot be opened at all.
    """
    checkpoint = open_checkpoint(path)
    recognised = recognise(checkpoint_specs(checkpoint))
    problems: list[str] = []
    if recognised.kind == "foreign":
        problems.append(f"cannot be served: {recognised.description}: {recognised.advice}")
    elif recognised.kind == "unknown":
        problems.append("cannot be served: the keys are those of no known network")
    elif not recognised.models:
        problems.append("the sizes are those of no known model")
    else:
        layout = layout_of(MODELS[recognised.models[0]], recognised.kind, quant_linear=recognised.quantized)
        comparison = layout.compare(checkpoint)
        if not comparison.fits:
            problems.append(f"keys {comparison.counts()}")
            problems += [line.strip() for line in comparison.lines()]
    if values:
        problems += _check_values(checkpoint)
    return Inspection(
        path=str(path),
        file_format=checkpoint.file_format,
        files=tuple(str(file) for file in checkpoint.paths),
        file_bytes=sum(file.stat().st_size for file in checkpoint.paths),
        kind=recognised.kind,
        description=recognised.description,
        models=recognised.models,
        quantized=recognised.quantized,
        num_tensors=len(checkpoint),
        tensor_bytes=sum(checkpoint.num_bytes(key) for key in checkpoint),
        dtypes=dict(Counter(dtype_name(checkpoint.dtype(key)) for key in checkpoint)),
        metadata=checkpoint.metadata,
        sha256=checkpoint.fingerprint() if sha256 else None,
        problems=tuple(problems),
        tensors=tuple(
            TensorSummary(
                key=checkpoint.stored_key(key),
                shape=checkpoint.shape(key),
                dtype=dtype_name(checkpoint.dtype(key)),
                num_bytes=checkpoint.num_bytes(key),
            )
            for key in checkpoint
        ),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _check_values(checkpoint: Checkpoint) -> list[str]:
    """Tensors holding NaN or infinity, and int8 scales that are not positive."""
    problems = []
    for key in checkpoint:
        try:
            tensor = checkpoint.tensor(key)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if not tensor.is_floating_point():
            continue
        tensor = tensor.float() if tensor.element_size() == 1 else tensor
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(tensor.flatten(), 1 << 24)):
            problems.append(f"{key}: holds values that are not finite")
        elif key.endswith(".scale") and bool((tensor <= 0).any()):
            problems.append(f"{key}: holds scales that are not positive")
    return problems
