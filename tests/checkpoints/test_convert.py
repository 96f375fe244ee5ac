"""Conversion to safetensors: bit for bit, atomic, recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from turbo_backend.checkpoints import convert_checkpoint, open_checkpoint
from turbo_backend.errors import CheckpointError

State = dict[str, torch.Tensor]
Write = Callable[..., Path]


@pytest.fixture
def mixed_state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "net.blocks.0.w": torch.randn(70, 30, generator=generator).to(torch.bfloat16),
        "net.blocks.0.transposed": torch.randn(8, 9, generator=generator).t(),
        "net.int8": torch.randint(-128, 128, (33, 3), dtype=torch.int8, generator=generator),
        "net.scale": torch.tensor([float("nan"), float("inf"), -0.0]),
        "net.half": torch.randn(5, generator=generator).half(),
        "net.scalar": torch.tensor(3.5),
        "net.empty": torch.zeros(0, 4),
        "net.flag": torch.tensor([True, False]),
    }


def _bits(tensor: torch.Tensor) -> tuple[object, ...]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return tuple(tensor.shape), tensor.dtype, data


def test_round_trip(mixed_state: State, write: Write, tmp_path: Path) -> None:
    source = write(mixed_state, "a.pth")
    seen: list[int] = []
    converted = convert_checkpoint(open_checkpoint(source), tmp_path / "out" / "a.safetensors", on_bytes=seen.append)
    loaded = load_file(converted.path)
    assert {f"net.{key}": _bits(tensor) for key, tensor in loaded.items()} == {
        key: _bits(tensor) for key, tensor in mixed_state.items()
    }
    checkpoint = open_checkpoint(converted.path)
    assert checkpoint.metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert checkpoint.metadata["source_file"] == "a.pth"
    assert checkpoint.metadata["source_format"] == "pth"
    assert sum(seen) == converted.num_bytes
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.safetensors"]


def test_sharded_round_trip(mixed_state: State, write: Write, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(mixed_state, "a.pth"))
    converted = convert_checkpoint(checkpoint, tmp_path / "b.safetensors", max_shard_bytes=400)
    assert converted.path == tmp_path / "b.safetensors.index.json"
    shards = sorted(tmp_path.glob("b-*.safetensors"))
    assert [path.name for path in shards] == [
        f"b-0000{i + 1}-of-0000{len(shards)}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 1
    again = open_checkpoint(converted.path)
    assert {key: _bits(again.tensor(key)) for key in again} == {
        key: _bits(checkpoint.tensor(key)) for key in checkpoint
    }
    index = json.loads(converted.path.read_text())
    assert index["metadata"]["total_size"] == converted.num_bytes
    assert not list(tmp_path.glob(".*"))
    single = convert_checkpoint(again, tmp_path / "c.safetensors")
    assert {key: _bits(t) for key, t in load_file(single.path).items()} == {
        key: _bits(again.tensor(key)) for key in again
    }


def test_refuses_to_overwrite(small_state: State, write: Write, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(small_state, "a.pth"))
    target = tmp_path / "b.safetensors"
    target.write_text("precious")
    with pytest.raises(CheckpointError, match="already exists: use --force"):
        convert_checkpoint(checkpoint, target)
    assert target.read_text() == "precious"
    convert_checkpoint(checkpoint, target, force=True)
    assert len(load_file(target)) == len(small_state)


def test_refuses_to_replace_its_source(small_state: State, write: Write) -> None:
    path = write(small_state, "a.safetensors")
    with pytest.raises(CheckpointError, match="is the file to convert"):
        convert_checkpoint(open_checkpoint(path), path, force=True)
    assert len(load_file(path)) == len(small_state)


def test_other_suffix(small_state: State, write: Write, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(small_state, "a.pth"))
    with pytest.raises(CheckpointError, match="must end in"):
        convert_checkpoint(checkpoint, tmp_path / "b.bin")


@pytest.mark.parametrize("max_shard_bytes", [None, 60])
def test_a_failure_leaves_nothing_behind(
    small_state: State, write: Write, tmp_path: Path, max_shard_bytes: int | None
) -> None:
    checkpoint = open_checkpoint(write(small_state, "a.pth"))
    read = checkpoint._read

    def fail(key: str) -> torch.Tensor:
        if key == "blocks.2.weight":
            raise CheckpointError("the disk was unplugged")
        return read(key)

    checkpoint._read = fail
    with pytest.raises(CheckpointError, match="unplugged"):
        convert_checkpoint(checkpoint, tmp_path / "out" / "b.safetensors", max_shard_bytes=max_shard_bytes)
    assert list((tmp_path / "out").iterdir()) == []


def test_disk_too_small(small_state: State, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"GB needed, 0\.0 GB free"):
        convert_checkpoint(open_checkpoint(write(small_state, "a.pth")), tmp_path / "b.safetensors")
