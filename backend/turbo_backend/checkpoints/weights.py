"""Which published files of a model are in a checkpoint folder, and whether they are what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from turbo_backend.checkpoints.comparison import explain, total_bytes
from turbo_backend.checkpoints.files import SUFFIXES, TOKENIZER_FILES
from turbo_backend.checkpoints.fingerprint import file_sha256
from turbo_backend.checkpoints.layouts import checkpoint_specs, layout_of
from turbo_backend.checkpoints.published import PublishedFile
from turbo_backend.checkpoints.reader import open_checkpoint
from turbo_backend.config import ModelConfig
from turbo_backend.errors import CheckpointError

State = Literal["ok", "absent", "not needed", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """One published file and what was found of it.

    Attributes:
        path: the file found (a conversion to safetensors counts), or where it would be.
        state: `not needed` is an absent file that another one stands in for.
        size: bytes found.
        expected_size: bytes published, where known.
        estimated_size: bytes of the tensors such a file holds, where the published size is not known.
        problem: why the state is `wrong`.
    """

    kind: str
    repository: str
    name: str
    path: str
    state: State
    size: int | None = None
    expected_size: int | None = None
    estimated_size: int | None = None
    num_tensors: int | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def check_files(
    model: ModelConfig, files: Sequence[PublishedFile], folder: Path, *, sha256: bool = False
) -> list[FileStatus]:
    """The state of each published file below `folder`: keys, shapes and dtypes are compared with the network's.

    Args:
        model: whose networks they must fit.
        files: from `published_files`.
        folder: the checkpoint folder.
        sha256: also compare the contents of files whose published hash is known, which reads them whole.
    """
    statuses = [_check(model, file, folder, sha256=sha256) for file in files]
    has_tokenizer = any(status.kind == "tokenizer" and status.state == "ok" for status in statuses)
    return [_excuse(status, file, has_tokenizer) for status, file in zip(statuses, files, strict=True)]


def _excuse(status: FileStatus, file: PublishedFile, has_tokenizer: bool) -> FileStatus:
    """Of the tokenizer's two forms one is enough."""
    if status.state != "absent" or (file.required and not (file.kind == "tokenizer" and has_tokenizer)):
        return status
    return FileStatus(**{**status.to_dict(), "state": "not needed"})  # type: ignore[arg-type]


def _check(model: ModelConfig, file: PublishedFile, folder: Path, *, sha256: bool) -> FileStatus:
    path = _find(folder, file)
    published = {
        "kind": file.kind,
        "repository": file.repository,
        "name": file.name,
        "path": str(path),
        "expected_size": file.size,
    }

    def status(state: State, **found: object) -> FileStatus:
        return FileStatus(state=state, **published, **found)  # type: ignore[arg-type]

    if not (path.exists() or path.is_symlink()):
        estimated = None if file.size or file.kind == "tokenizer" else _estimate(model, file)
        return status("absent", estimated_size=estimated)
    is_original = path.name == Path(file.name).name
    try:
        size = path.stat().st_size
        if file.kind == "tokenizer":
            problem = _check_size(file, size) or (_check_sha256(file, path) if sha256 else None)
            return status("wrong" if problem else "ok", size=size, problem=problem)
        checkpoint = open_checkpoint(path)
        size = sum(part.stat().st_size for part in checkpoint.paths)
        layout = layout_of(model, file.kind, quant_linear=file.quantized)
        comparison = layout.compare(checkpoint)
        problem = None
        if not comparison.fits:
            problem = explain(path, comparison, checkpoint_specs(checkpoint), layout.specs)
        elif is_original:
            problem = _check_size(file, size) or (_check_sha256(file, path) if sha256 else None)
        return status("wrong" if problem else "ok", size=size, num_tensors=len(checkpoint), problem=problem)
    except CheckpointError as error:
        return status("wrong", problem=str(error))
    except OSError as error:
        return status("wrong", problem=f"{path}: cannot be read: {error.strerror or error}")


def _estimate(model: ModelConfig, file: PublishedFile) -> int:
    """Floating tensors are published in bfloat16, but for the scales of int8 weights."""
    specs = layout_of(model, file.kind, quant_linear=file.quantized).specs
    return total_bytes(
        {
            key: (shape, torch.bfloat16 if dtype.is_floating_point and not key.endswith(".scale") else dtype)
            for key, (shape, dtype) in specs.items()
        }
    )


def _find(folder: Path, file: PublishedFile) -> Path:
    """The published file, or a conversion of it beside it."""
    path = folder / file.name
    if file.name in TOKENIZER_FILES or file.kind == "tokenizer":
        return path
    stem = path.name.rsplit(".", 1)[0]
    for suffix in SUFFIXES:
        candidate = path.with_name(stem + suffix)
        if candidate.exists() or candidate.is_symlink():
            return candidate
    return path


def _check_size(file: PublishedFile, size: int) -> str | None:
    if file.size is None or size == file.size:
        return None
    return f"{file.name}: {size:,} bytes, published with {file.size:,}"


def _check_sha256(file: PublishedFile, path: Path) -> str | None:
    if file.sha256 is None or file_sha256(path) == file.sha256:
        return None
    return f"{file.name}: its SHA-256 is not that of the published file"
