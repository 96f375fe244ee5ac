"""Bytes by name, in a folder of this machine or behind any fsspec URL: whole, or absent.

A name is a relative path with `/`. In a folder, content is written beside its destination, flushed to the disk and
renamed, and the rename flushed too: after a power cut, the name holds the old content or the new. Object stores put
whole objects by themselves. What lies underneath may still rot, so everything here is sealed by its writer with a
checksum (`turbo_backend.jobs.records`, `turbo_backend.jobs.steps`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from turbo_backend.errors import Misconfigured, ResourceExhausted, TurboError

_TEMPORARY = ".part"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Storage(Protocol):
    """Where jobs are kept; every method is safe in threads and raises what `explain_failure` makes of an OSError."""

    def write(self, name: str, content: bytes) -> None:
        """Stores content under a name, replacing what was there."""

    def read(self, name: str) -> bytes | None:
        """The content, or None where there is none."""

    def delete(self, folder: str) -> None:
        """Removes a name, or everything below it."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of everything below a folder, by name."""

    def lock(self) -> bool:
        """Makes this process the one that runs the jobs kept here, until it ends; False where another one is."""

    def clean(self) -> None:
        """Removes what a process that was killed had begun to write."""


def open_storage(location: str) -> Storage:
    """The storage at a path or URL; nothing is made or read yet.

    Raises:
        Misconfigured: the URL's protocol is unknown here, or fsspec is not installed.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Folder(Path(location).expanduser().absolute())
    if scheme == "file":
        return Folder(Path(rest).absolute())
    return RemoteFolder(location)


def explain_failure(error: OSError, location: str) -> TurboError:
    """What a caller is told: a full disk by name, anything else as the store's unavailability."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _NO_SPACE:
        return ResourceExhausted(f"the job store {location} is full: {reason}")
    return Misconfigured(f"the job store {location} does not work: {reason}")


class Folder:
    """A folder of this machine, made at the first write.

    Args:
        path: absolute.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: int | None = None

    def write(self, name: str, content: bytes) -> None:
        target = self._path / name
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_TEMPORARY}")
        with self._explained():
            self._make(target.parent)
            try:
                with temporary.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
            _flush_folder(target.parent)

    def read(self, name: str) -> bytes | None:
        with self._explained():
            try:
                return (self._path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def delete(self, folder: str) -> None:
        target = self._path / folder
        with self._explained(), contextlib.suppress(FileNotFoundError):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()
            _flush_folder(target.parent)

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = {}
        with self._explained():
            for path in self._files(folder):
                with contextlib.suppress(FileNotFoundError):  # a process writes or deletes here now
                    found[path.relative_to(self._path).as_posix()] = path.stat().st_size
        return found

    def lock(self) -> bool:
        if self._lock is not None:
            return True
        with self._explained():
            self._make(self._path)
            descriptor = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however this process ends
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._lock = descriptor
        return True

    def clean(self) -> None:
        with self._explained():
            for path in self._files("", temporary=True):
                path.unlink(missing_ok=True)

    def _files(self, folder: str, *, temporary: bool = False) -> Iterator[Path]:
        for parent, _, names in os.walk(self._path / folder):
            for name in names:
                if name.endswith(_TEMPORARY) == temporary:
                    yield Path(parent) / name

    def _make(self, folder: Path) -> None:
        """Makes a folder and flushes each one made, so that it is there after a power cut."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for child in reversed(missing):
            child.mkdir(exist_ok=True, mode=0o700)
            _flush_folder(child.parent)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain_failure(error, str(self._path)) from error


class RemoteFolder:
    """A folder behind an fsspec URL, such as `s3://bucket/jobs`. Nothing there can be locked: one server a URL.

    Args:
        url: as fsspec reads it.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise Misconfigured(
                f"the job store {url} needs fsspec: pip install 'turbodiffusion-server[remote-jobs]'"
            ) from None
        self._url = url
        try:
            open_url: Any = url_to_fs  # it has no types
            self._files, self._root = open_url(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise Misconfigured(f"the job store {url} cannot be opened: {error}") from None

    def write(self, name: str, content: bytes) -> None:
        with self._explained():
            self._files.makedirs(str(PurePosixPath(self._at(name)).parent), exist_ok=True)
            self._files.pipe_file(self._at(name), content)

    def read(self, name: str) -> bytes | None:
        with self._explained():
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def delete(self, folder: str) -> None:
        with self._explained(), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._at(folder), recursive=True)

    def sizes(self, folder: str = "") -> dict[str, int]:
        with self._explained():
            found = self._files.find(self._at(folder), detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {name[start:]: int(facts["size"]) for name, facts in found.items()}

    def lock(self) -> bool:
        return True

    def clean(self) -> None:
        """Nothing to do: an object that was not put whole does not exist."""

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain_failure(error, self._url) from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
