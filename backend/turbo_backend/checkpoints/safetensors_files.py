"""Reading `.safetensors` files, single and sharded (`*.safetensors.index.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from turbo_backend.errors import CheckpointError

_MAX_INDEX_BYTES = 64 << 20

#: Names of element types in the format, in torch's terms.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFile:
    """One mapped `.safetensors` file.

    Raises:
        CheckpointError: damaged, cut short, or of an element type unknown here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            opened: Any = safe_open(str(path), framework="pt", device="cpu")
            self._file = opened
            self.metadata: dict[str, str] = dict(opened.metadata() or {})
            self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = opened.get_slice(key)
                name = str(part.get_dtype())
                if name not in DTYPES:
                    raise CheckpointError(f"{path}: {key[:100]!r} has the unsupported element type {name}")
                self.specs[key] = (tuple(part.get_shape()), DTYPES[name])
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged or cut short: {str(error)[:200]}") from error

    def tensor(self, key: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: cannot read {key[:100]!r}: {str(error)[:200]}") from error
        return tensor


def read_index(path: Path) -> tuple[dict[str, SafetensorsFile], dict[str, str]]:
    """The shards of an index file, every one opened and compared with the index.

    Returns:
        (owner of each key, metadata of the index as text)

    Raises:
        CheckpointError: listing every shard that is absent and every key that is not where the index says.
    """
    weight_map, metadata = _parse_index(path)
    absent = sorted(name for name in set(weight_map.values()) if not (path.parent / name).exists())
    if absent:
        raise CheckpointError(f"{path}: {len(absent)} of its shards absent: {_few(absent)}")
    shards = {name: SafetensorsFile(path.parent / name) for name in sorted(set(weight_map.values()))}
    astray = [key for key, name in weight_map.items() if key not in shards[name].specs]
    if astray:
        raise CheckpointError(f"{path}: {len(astray)} keys are not in the shard named for them: {_few(astray)}")
    unlisted = [key for name, shard in shards.items() for key in shard.specs if weight_map.get(key) != name]
    if unlisted:
        raise CheckpointError(f"{path}: {len(unlisted)} keys of the shards are not in the index: {_few(unlisted)}")
    return {key: shards[name] for key, name in weight_map.items()}, metadata


def _parse_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: too large for an index of shards")
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable index of shards: {str(error)[:160]}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: an index of shards needs a `weight_map` that names at least one tensor")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {str(name)[:100]!r} is not the name of a shard beside the index")
    extra = index.get("metadata")
    return weight_map, {str(key): str(value) for key, value in extra.items()} if isinstance(extra, dict) else {}


def _few(names: list[str]) -> str:
    shown = ", ".join(name[:100] for name in names[:4])
    return shown if len(names) <= 4 else f"{shown}, and {len(names) - 4} more"
