"""Reading `.pth` files: zip archives written by `torch.save`, mapped into memory and never executed.

Of all that a pickle can do, only plain tensors in (nested) dictionaries are let through: torch's restricted
unpickler (`weights_only=True`) refuses code, and the zip directory is checked first, because the unpickler would
inflate a compressed member of any size. Tensors come back as views of a private mapping of the file, so opening a
28 GB file takes no memory.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from turbo_backend.errors import CheckpointError

#: A 14B denoiser's pickle of 1,575 tensors takes about 200 kB.
_MAX_PICKLE_BYTES = 64 << 20

_WRAPPERS = ("state_dict", "model")


def read_torch_archive(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a `.pth` file, by key as stored, and whatever else lay beside a wrapped state dict.

    Returns:
        (tensors, metadata): the tensors are lazy views of the mapped file; metadata holds plain values beside the
        state dict, such as `epoch`, as text.

    Raises:
        CheckpointError: damaged, compressed, of another kind, or asking for anything but tensors.
    """
    _check_directory(path)
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything: IndexError, KeyError, AssertionError...
        raise CheckpointError(f"{path}: {_explain(error)}") from error
    state_dict, metadata = _unwrap(path, loaded)
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: not a state dict: a key is a {type(key).__name__}, {str(key)[:60]!r}")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: not a state dict: {key[:100]!r} is a {type(value).__name__}, not a tensor")
        tensors[key] = _check_tensor(path, key, value)
    return tensors, metadata


def _check_directory(path: Path) -> None:
    """Refuses archives that are cut short, compressed (torch never compresses) or not torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size = path.stat().st_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged or cut short: {error}") from error
    pickles = [entry for entry in entries if entry.filename.split("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one written by torch.save (no data.pkl)")
    if any(entry.filename.split("/", 1)[-1] == "constants.pkl" for entry in entries):
        raise CheckpointError(f"{path}: a TorchScript program, not a state dict")
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed or sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"{path}: refused: members claim more data than the file holds or are compressed")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: refused: its pickle of {pickles[0].file_size:,} bytes cannot be a state dict")


def _explain(error: Exception) -> str:
    """One line for a failed `torch.load`."""
    # Only these parts of torch's message are shown: the rest advises to load the file with weights_only=False.
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"refused: the pickle asks for {found[1]}, and only plain tensors are loaded (never code)"
    if found := re.search(r"WeightsUnpickler error: (.*)", text):
        text = found[1]
    elif text.startswith("Weights only load failed"):
        text = "refused by the restricted unpickler"
    text = text.strip() or type(error).__name__
    return f"damaged or not a state dict: {text.splitlines()[0][:160]}"


def _unwrap(path: Path, loaded: object) -> tuple[Mapping[object, object], dict[str, str]]:
    """Descends into `{"state_dict": {...}}` and the like."""
    metadata: dict[str, str] = {}
    for _ in range(4):
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
        inner = [name for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)]
        if len(inner) > 1:
            raise CheckpointError(f"{path}: holds several state dicts ({', '.join(inner)}): keep only one")
        if not inner:
            if not loaded:
                raise CheckpointError(f"{path}: holds no tensors")
            return loaded, metadata
        for key, value in loaded.items():
            if isinstance(value, (str, int, float, bool)):
                metadata[str(key)[:100]] = str(value)[:1000]
        loaded = loaded[inner[0]]
    raise CheckpointError(f"{path}: nested too deeply to be a state dict")


def _check_tensor(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A dense CPU tensor backed by as many bytes as it claims.

    A zero stride would let a file of a few bytes claim a tensor of terabytes, allocated on first use.
    """
    shown = key[:100]
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: {shown!r} is not a plain dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {shown!r} claims shape {list(tensor.shape)}, but the file holds fewer values")
    return tensor.detach()
