"""Damaged and hostile files: one CheckpointError of one line, no code run, no memory spent, no crash."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from turbo_backend.checkpoints import inspect_file, open_checkpoint
from turbo_backend.errors import CheckpointError

State = dict[str, torch.Tensor]


def _refused(path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < len(str(path)) + 400
    return text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"x", "not a weight file|damaged"),
        (b"hello, this is a text file, not weights", "not a weight file|damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (gzip.compress(b"abc"), "gzip"),
        (struct.pack("<Q", 1 << 62) + b"{", "damaged|not a weight file"),
        (struct.pack("<Q", 1000) + b'{"a":', "damaged or cut short"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (b"PK\x03\x04" + bytes(100), "damaged or cut short"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
def test_wrong_content(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, message)


def test_wrong_kind_of_file(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.pth", "no such file")
    _refused(tmp_path, "a folder")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    _refused(tmp_path / "loop.pth", "cannot be read")
    os.mkfifo(tmp_path / "fifo.pth")
    _refused(tmp_path / "fifo.pth", "not a regular file")
    _refused(Path("/dev/zero"), "not a regular file")
    (tmp_path / "x.index.json").write_text("[" * 100_000)
    _refused(tmp_path / "x.index.json", "not a readable index")


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_truncated(small_state: State, write: Callable[..., Path], name: str, keep: float) -> None:
    path = write(small_state, name)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(size * keep))
    _refused(path, "damaged or cut short")


class _Runs:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": _Runs(os.system, f"touch {victim}")}, tmp_path / "evil.pth")
    _refused(tmp_path / "evil.pth", "refused: the pickle asks for (posix|os).system")
    torch.save(_Runs(eval, f"open({str(victim)!r}, 'w')"), tmp_path / "evil.pth")
    _refused(tmp_path / "evil.pth", "refused: the pickle asks for .*eval")
    assert not victim.exists()


def test_legacy_format_is_explained(tmp_path: Path, small_state: State) -> None:
    torch.save(small_state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    _refused(tmp_path / "old.pth", "before torch 1.6")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    _refused(tmp_path / "plain.pkl", "before torch 1.6")


@pytest.mark.parametrize(
    "content",
    [torch.ones(3), [torch.ones(3)], {"a": 3}, {3: torch.ones(1)}, {}, {"a": {"b": torch.ones(2)}}, "text"],
    ids=str,
)
def test_not_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", "not a state dict|no tensors")


def test_two_state_dicts_in_one_file(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", "several state dicts")


def _rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, change(name, data))


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    _rewrite(path, lambda name, data: bytes(300 << 20) if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    _refused(path, "more data than the file holds or are compressed")


def test_tensor_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.pth")
    _refused(tmp_path / "wide.pth", "the file holds fewer values")


# PyTorch 2.14 says that it looks at every value.
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("make", [lambda: torch.ones(3).to_sparse(), lambda: torch.ones(3, device="meta")])
def test_unusual_tensors_are_refused(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    torch.save({"a": make()}, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", "not a plain dense tensor|refused")


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    _refused(tmp_path / "a.pth", "not one written by torch.save")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, which is not what is tested
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", "TorchScript")


def _valid_files() -> dict[str, bytes]:
    state = {"net.blocks.0.weight": torch.ones(3, 5), "b": torch.ones(2, dtype=torch.bfloat16)}
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer)
    return {"pth": buffer.getvalue(), "safetensors": save(state)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_never_do_more_than_raise(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    content = bytearray(_valid_files()[suffix])
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / f"fuzzed.{suffix}"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        inspect_file(path, values=True)
        for key in checkpoint:
            assert checkpoint.tensor(key).clone().shape == checkpoint.shape(key)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either outcome is fine)
