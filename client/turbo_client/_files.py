"""Files that are either whole or absent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name only when the block ends well.

    It is written beside its destination (a rename is atomic only within one file system), flushed to disk, then
    renamed. A symbolic link keeps pointing where it did. Whatever ends the block early removes the temporary file.

    Raises:
        OSError: the folder is absent or not writable, the disk is full, or `path` is a folder or a device.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{os.fspath(path)} exists and is not a regular file")
    temporary = target.with_name(f".{target.name[:64]}.{secrets.token_hex(4)}.part")
    # Opened by hand for the permissions of a normal new file: tempfile's are 0600.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
