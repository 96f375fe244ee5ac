"""Bytes by name, in folders and behind fsspec."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbo_backend.errors import Misconfigured, ResourceExhausted
from turbo_backend.jobs.storage import Folder, Storage, explain_failure, open_storage


def test_what_is_written_is_read_listed_replaced_and_deleted(storage: Storage) -> None:
    assert storage.read("a/b/c") is None
    assert storage.sizes() == {}
    storage.write("a/b/c", b"one")
    storage.write("a/d", b"three")
    storage.write("a/d", b"four!")
    assert storage.read("a/d") == b"four!"
    assert storage.sizes() == {"a/b/c": 3, "a/d": 5}
    assert storage.sizes("a/b") == {"a/b/c": 3}
    storage.delete("a/d")
    storage.delete("a/d")
    assert storage.sizes("a") == {"a/b/c": 3}
    storage.delete("a")
    assert storage.read("a/b/c") is None
    assert storage.sizes() == {}


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    open_storage(f"file://{tmp_path}/x").write("a", b"1")
    assert (tmp_path / "x" / "a").read_bytes() == b"1"


def test_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(Misconfigured, match="nowhere://bucket cannot be opened"):
        open_storage("nowhere://bucket")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.write("a", b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceExhausted, match=rf"the job store {tmp_path} is full"):
        folder.write("a", b"after")
    monkeypatch.undo()
    assert folder.read("a") == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Misconfigured, match="does not work"):
        Folder(tmp_path / "file" / "jobs").write("a", b"")
    assert "Read-only" in str(explain_failure(OSError(errno.EROFS, os.strerror(errno.EROFS)), "/x"))


def test_what_a_killed_process_left_is_cleaned(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("a/b", b"whole")
    (tmp_path / "a" / ".b.0123.part").write_bytes(b"ha")
    assert folder.sizes() == {"a/b": 5}
    folder.clean()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_one_process_holds_a_folder_until_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from turbo_backend.jobs.storage import Folder\n"
        "folder = Folder(Path(sys.argv[1]))\n"
        "print(folder.lock(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        folder = Folder(tmp_path)
        assert not folder.lock()
        other.kill()
        other.wait()
    assert folder.lock()
    assert folder.lock()
