"""Files that commands write: checked before minutes of work, and described once they are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from turbo_client._files import atomic_file
from turbo_client._generation import Progress
from turbo_client._options import UsageError
from turbo_client._video import Video


def check_output(output: Path, *, force: bool) -> None:
    """Refuses before minutes of work what could not be written after them."""
    if os.path.lexists(output) and not (output.exists() and not output.is_file()) and not force:
        raise UsageError(f"{output} exists; --force replaces it")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} exists and is not a regular file")
    _check_writable(output.parent)


def check_preview_dir(folder: Path) -> None:
    """Makes the folder of previews, or refuses."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make folder {folder}: {error.strerror}") from None
    _check_writable(folder)


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"folder {folder} does not exist")
    # Permission bits say little under network file systems and for root: write something.
    probe = folder / f".turbodiffusion-{os.getpid()}.part"
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise UsageError(f"cannot write in folder {folder}: {error.strerror}") from None
    probe.unlink()


def save_preview(progress: Progress, folder: Path | None) -> None:
    """Writes a step's preview, where there is one and a folder for it."""
    if progress.preview is not None and folder is not None:
        with atomic_file(folder / f"step_{progress.step}_of_{progress.num_steps}.jpg") as file:
            file.write(progress.preview)


def save(video: Video, output: Path, *, force: bool) -> None:
    """Writes a video to a file that `check_output` let pass.

    Raises:
        OSError: it appeared since, or cannot be written.
    """
    if not force and os.path.lexists(output):
        raise FileExistsError(f"{output} appeared while the video was made; it was left alone, and nothing was written")
    try:
        video.save(output)
    except OSError as error:
        raise OSError(f"{output} cannot be written: {error.strerror or error}") from error


def result_object(video: Video, output: Path, seconds: float) -> dict[str, Any]:
    """What `--json` prints of a video."""
    return {
        "path": str(output),
        "container": video.container,
        "request_id": video.request_id,
        "seed": video.seed,
        "width": video.width,
        "height": video.height,
        "num_frames": video.num_frames,
        "fps": video.fps,
        "bytes": output.stat().st_size,
        "seconds": round(seconds, 3),
        "report": video.report,
    }
