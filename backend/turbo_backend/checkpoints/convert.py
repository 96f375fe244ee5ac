"""Converting a checkpoint to `.safetensors`, in one file or in shards, without ever holding the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from turbo_backend import __version__
from turbo_backend.checkpoints.reader import Checkpoint
from turbo_backend.checkpoints.recognise import recognise
from turbo_backend.checkpoints.writer import Replacing, TensorSpec, require_free_space, write_safetensors
from turbo_backend.errors import CheckpointError

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion wrote: open `path`; `files` are all of them."""

    path: Path
    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int
    source_sha256: str


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    *,
    force: bool = False,
    max_shard_bytes: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Converted:
    """Writes the tensors of `checkpoint` bit for bit under their published names.

    The header records the source: `source_file`, `source_sha256`, `source_format`, and what it was recognised as.

    Args:
        checkpoint: an open file of any format.
        target: a path ending in `.safetensors`. With shards, `name.safetensors` becomes
            `name-00001-of-00003.safetensors` and so on, with `name.safetensors.index.json` beside them.
        force: replace files already there.
        max_shard_bytes: begin a new file before this many bytes of tensors are exceeded (a larger tensor gets a
            file of its own); None writes one file.
        on_bytes: told the size of each piece written.

    Raises:
        CheckpointError: the target exists, is the source, cannot be written, or the disk is too full. Nothing is
            left behind.
    """
    if not target.name.endswith(_SUFFIX) or target.name == _SUFFIX:
        raise CheckpointError(f"{target}: must end in {_SUFFIX}")
    specs: dict[str, TensorSpec] = {key: (checkpoint.shape(key), checkpoint.dtype(key)) for key in checkpoint}
    shards = _split(checkpoint, max_shard_bytes)
    files, index = _file_names(target, len(shards))
    outputs = files if index is None else (*files, index)
    for output in outputs:
        if any(output.exists() and output.samefile(source) for source in (*checkpoint.paths, checkpoint.path)):
            raise CheckpointError(f"{output}: is the file to convert: choose another name")
    total = sum(checkpoint.num_bytes(key) for key in checkpoint)
    with Replacing(outputs, force=force) as temporaries:
        require_free_space(target.parent, total + (16 << 20))
        metadata = _describe_source(checkpoint, specs)
        for keys, temporary in zip(shards, temporaries, strict=False):
            part = {key: specs[key] for key in keys}
            write_safetensors(temporary, part, checkpoint.tensor, metadata=metadata, on_bytes=on_bytes)
        if index is not None:
            weight_map = {key: file.name for keys, file in zip(shards, files, strict=True) for key in keys}
            document = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
            temporaries[-1].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Converted(
        path=index or files[0],
        files=outputs,
        num_tensors=len(checkpoint),
        num_bytes=total,
        source_sha256=metadata["source_sha256"],
    )


def _describe_source(checkpoint: Checkpoint, specs: dict[str, TensorSpec]) -> dict[str, str]:
    return {
        **checkpoint.metadata,
        "format": "pt",
        "source_file": checkpoint.path.name,
        "source_sha256": checkpoint.fingerprint(),
        "source_format": checkpoint.file_format,
        "recognised": recognise(specs).description,
        "converted_by": f"turbodiffusion-server {__version__}",
    }


def _split(checkpoint: Checkpoint, max_shard_bytes: int | None) -> list[list[str]]:
    """Keys of each shard, in the order of the file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key in checkpoint:
        size = checkpoint.num_bytes(key)
        if max_shard_bytes is not None and shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _file_names(target: Path, count: int) -> tuple[tuple[Path, ...], Path | None]:
    if count == 1:
        return (target,), None
    stem = target.name.removesuffix(_SUFFIX)
    files = tuple(target.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}{_SUFFIX}") for i in range(count))
    return files, target.with_name(stem + _INDEX_SUFFIX)
