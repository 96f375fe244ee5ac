"""Identity of a weight file: the SHA-256 of its contents, as Hugging Face lists it for the same file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

from turbo_backend.errors import CheckpointError

_READ_BYTES = 8 << 20

_known: dict[tuple[str, int, int], str] = {}
_known_lock = threading.Lock()


def file_sha256(path: Path) -> str:
    """SHA-256 of one file as 64 hexadecimal digits, streamed in pieces of 8 MiB.

    Remembered for the life of the process by path, size and modification time, so that every video made by a
    server can name its weights without reading them again.

    Raises:
        CheckpointError: the file cannot be read, or changes while it is read.
    """
    try:
        before = path.stat()
        key = (str(path.resolve()), before.st_size, before.st_mtime_ns)
        with _known_lock:
            if key in _known:
                return _known[key]
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_READ_BYTES))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        after = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{path}: changed while its fingerprint was taken")
    with _known_lock:
        return _known.setdefault(key, digest.hexdigest())


def combined_sha256(paths: Sequence[Path]) -> str:
    """Fingerprint of a checkpoint of one or several files.

    One file: its SHA-256. Several: the SHA-256 of the lines `<sha256>  <file name>`, sorted by name, which is
    what `sha256sum *.safetensors | sort -k2 | sha256sum` prints.
    """
    if len(paths) == 1:
        return file_sha256(paths[0])
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(paths, key=lambda path: path.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
