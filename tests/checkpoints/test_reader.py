"""Opening checkpoints of every format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turbo_backend.checkpoints import open_checkpoint
from turbo_backend.checkpoints.reader import strip_prefixes
from turbo_backend.errors import CheckpointError

State = dict[str, torch.Tensor]


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_reads_what_was_saved(small_state: State, write: Callable[..., Path], name: str) -> None:
    checkpoint = open_checkpoint(write(small_state, name))
    assert set(checkpoint.keys()) == set(small_state)
    assert len(checkpoint) == len(small_state)
    for key, tensor in small_state.items():
        assert key in checkpoint
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert checkpoint.dtype(key) == tensor.dtype
        assert checkpoint.num_bytes(key) == tensor.numel() * 2
        torch.testing.assert_close(checkpoint.tensor(key), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 7}, lambda s: {"model": {"state_dict": s}}])
def test_nested_state_dicts_are_unwrapped(
    small_state: State, tmp_path: Path, wrap: Callable[[State], dict[str, object]]
) -> None:
    torch.save(wrap(small_state), tmp_path / "a.pth")
    checkpoint = open_checkpoint(tmp_path / "a.pth")
    assert set(checkpoint.keys()) == set(small_state)
    assert checkpoint.metadata == ({"epoch": "7"} if "epoch" in wrap(small_state) else {})


def test_content_decides_not_the_suffix(small_state: State, write: Callable[..., Path], tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    write(small_state, "a.safetensors").rename(blob)
    assert open_checkpoint(blob).file_format == "safetensors"


@pytest.mark.parametrize(
    ("stored", "published"),
    [
        ("net.blocks.0.norm3.bias", "blocks.0.norm3.bias"),
        ("module.net.head.modulation", "head.modulation"),
        ("model.diffusion_model.head.modulation", "head.modulation"),
        ("net.blocks.3._checkpoint_wrapped_module.ffn.0.weight", "blocks.3.ffn.0.weight"),
        ("_orig_mod.conv1.weight", "conv1.weight"),
        ("encoder.net.weight", "encoder.net.weight"),
    ],
)
def test_prefixes(stored: str, published: str) -> None:
    assert strip_prefixes(stored) == published


def test_prefixed_file_reads_under_published_names(write: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(write({"net.head.modulation": torch.ones(2), "logvar": torch.zeros(1)}, "a.pth"))
    assert set(checkpoint.keys()) == {"head.modulation", "logvar"}
    assert checkpoint.stored_key("head.modulation") == "net.head.modulation"
    assert checkpoint.tensor("head.modulation").tolist() == [1, 1]


def test_two_prefixes_of_one_key_are_refused(write: Callable[..., Path]) -> None:
    path = write({"net.a": torch.ones(2), "a": torch.zeros(2)}, "a.pth")
    with pytest.raises(CheckpointError, match=r"'net\.a' and 'a'|'a' and 'net\.a'"):
        open_checkpoint(path)


def test_safetensors_metadata(small_state: State, write: Callable[..., Path]) -> None:
    assert open_checkpoint(write(small_state, "a.safetensors", {"who": "me"})).metadata == {"who": "me"}


def test_fingerprint_is_the_sha256_of_the_contents(small_state: State, write: Callable[..., Path]) -> None:
    path = write(small_state, "a.pth")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_checkpoint(path).fingerprint() == expected
    write({"b": torch.ones(1)}, "a.pth")
    assert open_checkpoint(path).fingerprint() != expected, "a changed file must not keep its old fingerprint"


def _write_shards(folder: Path, shards: dict[str, State], weight_map: dict[str, str] | None = None) -> Path:
    for name, state in shards.items():
        save_file(state, folder / name)
    index = folder / "m.safetensors.index.json"
    weight_map = weight_map or {key: name for name, state in shards.items() for key in state}
    index.write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
    return index


@pytest.fixture
def two_shards() -> dict[str, State]:
    return {"m-1.safetensors": {"a": torch.ones(2), "b": torch.ones(3)}, "m-2.safetensors": {"c": torch.full((4,), 7)}}


def test_sharded(tmp_path: Path, two_shards: dict[str, State]) -> None:
    checkpoint = open_checkpoint(_write_shards(tmp_path, two_shards))
    assert checkpoint.file_format == "sharded safetensors"
    assert {key: checkpoint.shape(key) for key in checkpoint} == {"a": (2,), "b": (3,), "c": (4,)}
    assert checkpoint.tensor("c").tolist() == [7] * 4
    assert [path.name for path in checkpoint.paths] == ["m-1.safetensors", "m-2.safetensors"]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in checkpoint.paths]
    assert checkpoint.fingerprint() == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_absent_shard_is_named(tmp_path: Path, two_shards: dict[str, State]) -> None:
    index = _write_shards(tmp_path, two_shards)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of its shards absent: m-2\.safetensors"):
        open_checkpoint(index)


def test_every_shard_is_checked(tmp_path: Path, two_shards: dict[str, State]) -> None:
    index = _write_shards(tmp_path, two_shards)
    with (tmp_path / "m-2.safetensors").open("r+b") as file:
        file.truncate(60)
    with pytest.raises(CheckpointError, match=r"m-2\.safetensors: damaged"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-1.safetensors"}, "not in the shard named"),
        ({"a": "m-1.safetensors", "c": "m-2.safetensors"}, "not in the index: b"),
        ({"a": "../m-1.safetensors"}, "not the name of a shard"),
        ({"a": 3}, "not the name of a shard"),
        ({}, "needs a `weight_map`"),
        ([], "needs a `weight_map`"),
    ],
)
def test_index_that_disagrees(
    tmp_path: Path, two_shards: dict[str, State], weight_map: dict[str, str], message: str
) -> None:
    index = _write_shards(tmp_path, two_shards)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(index)
