"""Cancellations that are filed in one process and seen in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbo_backend.cancellation import FOLDER_VARIABLE, MAX_KEY_BYTES, Cancellations
from turbo_backend.errors import InvalidArgument, Misconfigured

KEYS = ["a", "../../etc/passwd", "job 7/ü\n", "\0", "日本", "x" * MAX_KEY_BYTES, "\ud800"]


def test_each_key_stands_for_itself(tmp_path: Path) -> None:
    cancellations = Cancellations(tmp_path / "made" / "here")
    for key in KEYS:
        assert not cancellations.is_requested(key)
        cancellations.request(key)
        cancellations.request(key)
        assert [other for other in KEYS if cancellations.is_requested(other)] == [key]
        cancellations.forget(key)
        cancellations.forget(key, "never filed", "")
        assert not cancellations.is_requested(key)
    assert not any((tmp_path / "made" / "here").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "no key leads out of the folder"


@pytest.mark.parametrize("key", ["", "x" * (MAX_KEY_BYTES + 1)])
def test_what_is_no_key_is_refused_and_never_requested(tmp_path: Path, key: str) -> None:
    cancellations = Cancellations(tmp_path)
    with pytest.raises(InvalidArgument, match=f"1 to {MAX_KEY_BYTES} bytes"):
        cancellations.request(key)
    assert not cancellations.is_requested(key)


def test_what_nobody_took_up_is_removed(tmp_path: Path) -> None:
    cancellations = Cancellations(tmp_path)
    cancellations.request("too late")
    (file,) = tmp_path.iterdir()
    os.utime(file, (0, 0))
    cancellations.request("new")
    assert cancellations.is_requested("new")
    assert not cancellations.is_requested("too late")


@pytest.mark.parametrize("given", [True, False])
def test_processes_of_one_server_share_them(tmp_path: Path, given: bool) -> None:
    """Two children of this process, as the models are tritonserver's; without a launcher they agree all the same."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop(FOLDER_VARIABLE, None)
    if given:
        environment[FOLDER_VARIABLE] = str(tmp_path / "given")
    use = "from turbo_backend.cancellation import Cancellations; cancellations = Cancellations.of_server(); "
    for code, left in (
        ("cancellations.close(); cancellations.request('a')", 1),
        ("assert cancellations.is_requested('a'); cancellations.forget('a'); cancellations.close()", 0),
    ):
        subprocess.run([sys.executable, "-c", use + code], env=environment, check=True)
        assert len(list(tmp_path.iterdir())) == left


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link", "file/below"):
        with pytest.raises(Misconfigured, match="folder of cancellations"):
            Cancellations(tmp_path / name)
