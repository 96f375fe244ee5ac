"""Opening a weight file of any supported format without reading its weights."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from turbo_backend.checkpoints.fingerprint import combined_sha256
from turbo_backend.checkpoints.safetensors_files import SafetensorsFile, read_index
from turbo_backend.checkpoints.torch_archive import read_torch_archive
from turbo_backend.errors import CheckpointError

#: What training and wrapping put in front of every key of the published files.
_LEADING_PREFIXES = ("net.", "module.", "model.", "diffusion_model.", "_orig_mod.")
_WRAPPED_MODULE = "_checkpoint_wrapped_module."

_FOREIGN_STARTS = (
    (b"GGUF", "a GGUF file (llama.cpp quantization), which is not supported: use the published .pth"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again"),
    (b"<!DOCTYPE", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
    (b"\x89HDF", "an HDF5 file, which is not supported"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\x80", "a torch file of the format before torch 1.6, which cannot be mapped: load it with "
              "torch.load(weights_only=True) and save it again"),
    (b"ustar", "a tar archive: unpack it first"),
)  # fmt: skip


class Checkpoint:
    """Named tensors of one checkpoint, read one by one.

    Keys are as upstream publishes them: prefixes left by training (`net.`, `module.`, `model.`,
    `_checkpoint_wrapped_module.`) are gone. Use `open_checkpoint`.

    Attributes:
        path: what was opened.
        paths: every file it is made of (the index file of a sharded checkpoint is not one of them).
        file_format: `pth`, `safetensors` or `sharded safetensors`.
        metadata: text stored beside the tensors.
    """

    def __init__(
        self,
        path: Path,
        paths: tuple[Path, ...],
        file_format: str,
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]],
        read: Callable[[str], torch.Tensor],
        metadata: dict[str, str],
    ) -> None:
        self.path = path
        self.paths = paths
        self.file_format = file_format
        self.metadata = metadata
        self._read = read
        self._stored_keys: dict[str, str] = {}
        self._specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for stored, spec in specs.items():
            key = strip_prefixes(stored)
            if key in self._specs:
                other = self._stored_keys[key]
                raise CheckpointError(f"{path}: {stored[:100]!r} and {other[:100]!r} are both {key[:100]!r}")
            self._stored_keys[key] = stored
            self._specs[key] = spec

    def keys(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def __contains__(self, key: object) -> bool:
        return key in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._specs[key][0]

    def dtype(self, key: str) -> torch.dtype:
        return self._specs[key][1]

    def num_bytes(self, key: str) -> int:
        shape, dtype = self._specs[key]
        return math.prod(shape) * dtype.itemsize

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor as a view of the mapped file: copy it before the file may change, and never write to it."""
        return self._read(self._stored_keys[key])

    def stored_key(self, key: str) -> str:
        """The key as the file has it, prefixes included."""
        return self._stored_keys[key]

    def fingerprint(self) -> str:
        """SHA-256 of the file (or files, see `combined_sha256`); the first call reads them whole."""
        return combined_sha256(self.paths)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a `.pth`, a `.safetensors` or the `.safetensors.index.json` of a sharded one, by content, lazily.

    Raises:
        CheckpointError: one line: absent, not a regular file, empty, cut short, of another format, holding code...
    """
    path = Path(path)
    start, size = _first_bytes(path)
    if path.name.endswith(".index.json"):
        owners, metadata = read_index(path)
        specs = {key: shard.specs[key] for key, shard in owners.items()}
        shards = tuple(dict.fromkeys(shard.path for shard in owners.values()))
        return Checkpoint(path, shards, "sharded safetensors", specs, lambda key: owners[key].tensor(key), metadata)
    if start.startswith(b"PK\x03\x04"):
        tensors, metadata = read_torch_archive(path)
        specs = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        return Checkpoint(path, (path,), "pth", specs, tensors.__getitem__, metadata)
    if _may_be_safetensors(start, size):
        file = SafetensorsFile(path)
        if not file.specs:
            raise CheckpointError(f"{path}: holds no tensors")
        return Checkpoint(path, (path,), "safetensors", file.specs, file.tensor, file.metadata)
    for beginning, what in _FOREIGN_STARTS:
        if start.startswith(beginning):
            raise CheckpointError(f"{path}: {what}")
    expected = "a .safetensors or a .pth of torch >= 1.6"
    if path.suffix in (".pth", ".pt", ".safetensors"):
        raise CheckpointError(f"{path}: damaged: its beginning is not that of {expected}")
    raise CheckpointError(f"{path}: not a weight file: {expected} is needed")


def strip_prefixes(key: str) -> str:
    """The published name of a key: `net.blocks.0._checkpoint_wrapped_module.norm3.bias` -> `blocks.0.norm3.bias`."""
    key = key.replace(_WRAPPED_MODULE, "")
    while prefix := next((prefix for prefix in _LEADING_PREFIXES if key.startswith(prefix)), None):
        key = key[len(prefix) :]
    return key


def _first_bytes(path: Path) -> tuple[bytes, int]:
    """Beginning and size of a regular file; a FIFO or device is refused without being opened."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path}: a folder: name a .pth, .safetensors or .safetensors.index.json file in it")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise CheckpointError(f"{path}: empty")
        with path.open("rb") as file:
            return file.read(64), status.st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _may_be_safetensors(start: bytes, size: int) -> bool:
    """A safetensors file begins with the length of its JSON header, 8 bytes little-endian, then `{`."""
    return size > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100 << 20
