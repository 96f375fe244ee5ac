"""Videos: frames, and files that are whole or absent."""

import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_triton import FRAMES, REPORT

from turbo_client import MissingExtraError, Video
from turbo_client._files import atomic_file
from turbo_client._responses import StageResponse


def make(*, video: bytes = b"", frames: np.ndarray | None = None) -> Video:
    response = StageResponse(
        stage="done", step=1, num_steps=1, preview=b"", video=video, frames=frames, report=dict(REPORT)
    )
    return Video.of(response, request_id="r1")


def test_frames_of_an_mp4_are_decoded(mp4: bytes) -> None:
    frames = make(video=mp4).frames()
    assert (frames.shape, frames.dtype) == (FRAMES.shape, np.uint8)
    # Noise survives 4:2:0 and x264 badly; its mean does not.
    assert abs(frames.mean() - FRAMES.mean()) < 8


def test_decoding_says_what_it_needs(mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # how Python itself marks a module as absent
    with pytest.raises(MissingExtraError, match=r"turbodiffusion-server\[frames\]"):
        make(video=mp4).frames()
    np.testing.assert_array_equal(make(frames=FRAMES).frames(), FRAMES)


def test_save_mp4(mp4: bytes, tmp_path: Path) -> None:
    make(video=mp4).save(tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == mp4
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_save_raw(tmp_path: Path) -> None:
    make(frames=FRAMES).save(str(tmp_path / "out.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy", allow_pickle=False), FRAMES)


def test_permissions_are_those_of_a_new_file(mp4: bytes, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    make(video=mp4).save(tmp_path / "out.mp4")
    assert stat.S_IMODE((tmp_path / "out.mp4").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
def test_a_file_cut_short_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out.mp4").write_bytes(b"older")

    def write() -> None:
        with atomic_file(tmp_path / "out.mp4") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (tmp_path / "out.mp4").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real.mp4").write_bytes(b"older")
    (tmp_path / "out.mp4").symlink_to("folder/real.mp4")
    with atomic_file(tmp_path / "out.mp4") as file:
        file.write(b"new")
    assert (tmp_path / "out.mp4").is_symlink()
    assert (tmp_path / "folder" / "real.mp4").read_bytes() == b"new"


def test_folders_and_devices_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path, tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(FileExistsError, match="not a regular file"), atomic_file(target):
            pass
    assert Path(os.devnull).is_char_device()


def test_long_names(tmp_path: Path) -> None:
    name = "狐" * 80 + ".mp4"  # 244 bytes of the 255 that a name may have
    with atomic_file(tmp_path / name) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == [name]
