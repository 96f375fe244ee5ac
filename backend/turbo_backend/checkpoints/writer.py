"""Writing `.safetensors` files tensor by tensor, so that a model larger than memory can be written.

`safetensors.torch.save_file` wants every tensor at once and copies each into a Python object; this writer needs
only their shapes in advance. The format is eight bytes of header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from turbo_backend.checkpoints.safetensors_files import DTYPES
from turbo_backend.errors import CheckpointError

TensorSpec = tuple[tuple[int, ...], torch.dtype]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITE_BYTES = 32 << 20


def num_bytes(spec: TensorSpec) -> int:
    """Bytes of one tensor."""
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], torch.Tensor],
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes one file; call it through `Replacing` so that nobody sees it half written.

    Args:
        path: file to create.
        specs: shape and dtype of each tensor.
        read: gives each tensor when its turn comes; it may be a view of a mapped file.
        metadata: text for the header.
        on_bytes: told the number of bytes after each piece written.

    Raises:
        CheckpointError: a tensor that is not as announced or a disk that is full.
    """
    # Widest elements first keeps every tensor aligned to its element size, which readers that map the file need.
    order = sorted(specs, key=lambda key: (-specs[key][1].itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key in order:
        shape, dtype = specs[key]
        if dtype not in _NAMES:
            raise CheckpointError(f"{key}: {dtype} cannot be stored as safetensors")
        end = offset + num_bytes(specs[key])
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                tensor = read(key)
                if (tuple(tensor.shape), tensor.dtype) != specs[key]:
                    raise CheckpointError(f"{key}: is {list(tensor.shape)} {tensor.dtype}, announced {specs[key]}")
                for piece in _pieces(tensor):
                    file.write(piece)
                    if on_bytes is not None:
                        on_bytes(len(piece))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def _pieces(tensor: torch.Tensor) -> Iterable[memoryview]:
    if tensor.numel() == 0:
        return
    data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(data), _WRITE_BYTES):
        yield data[start : start + _WRITE_BYTES]


class Replacing:
    """Files that appear under their names only when all of them are whole.

        with Replacing([target], force=False) as (temporary,):
            ...write temporary...

    Args:
        targets: final paths, all in one folder; they are renamed in this order, so list an index file last.
        force: whether files already there are replaced.

    Raises:
        CheckpointError: a target exists and `force` is off, or its folder cannot be written.
    """

    def __init__(self, targets: Iterable[Path], *, force: bool) -> None:
        self._targets = tuple(targets)
        self._force = force
        token = secrets.token_hex(4)
        self._temporaries = tuple(target.with_name(f".{target.name}.{token}.part") for target in self._targets)

    def __enter__(self) -> tuple[Path, ...]:
        self._refuse_existing()
        try:
            self._targets[0].parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._targets[0].parent}: cannot be made: {error.strerror}") from error
        return self._temporaries

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._refuse_existing()
                for temporary, target in zip(self._temporaries, self._targets, strict=True):
                    os.replace(temporary, target)
        finally:
            for temporary in self._temporaries:
                temporary.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        existing = [str(target) for target in self._targets if target.exists() or target.is_symlink()]
        if existing and not self._force:
            raise CheckpointError(f"{existing[0]}: already exists: use --force to replace it")


def require_free_space(folder: Path, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        CheckpointError: fewer than `needed` bytes are free where `folder` is (or will be made).
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(f"{folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
