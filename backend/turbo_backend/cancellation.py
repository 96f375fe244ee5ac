"""Cancellations that reach every model process of one server: a folder that they share, with a file for each.

Triton does not tell a model that its request was given up (issue 6739 of its server), so cancelling has a channel of
its own. Whoever cancels files a key: a request's id, or the token that a request carries from model to model. The
models look for it between their steps and chunks, and the one that ends the request removes the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from turbo_backend.errors import InvalidArgument, Misconfigured

#: The launcher sets it to a folder that it removes when the server has ended.
FOLDER_VARIABLE = "TURBO_CANCELLATION_DIR"
#: Filed by the launcher before it stops the server: no request's id, but word to the jobs not to start another one.
STOPPING = "the server is stopping"
#: A key longer than this belongs to no request.
MAX_KEY_BYTES = 1024
#: A cancellation that no model took up in this time came too late for its request, or named none.
_KEPT_SECONDS = 3600.0


class Cancellations:
    """The cancellations of one server; any process and thread of it may use them.

    Args:
        folder: where they are, made when absent.

    Raises:
        Misconfigured: the folder cannot be made, or belongs to another user.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
        except OSError as error:
            raise Misconfigured(f"folder of cancellations {folder}: {error.strerror or error}") from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise Misconfigured(f"folder of cancellations {folder} is not a folder of this user's")
        self._folder = folder

    @classmethod
    def of_server(cls, environ: Mapping[str, str] | None = None) -> Cancellations:
        """Those of the server that this model process belongs to.

        The folder is the launcher's, or for a tritonserver without one it is named after the parent process, which
        is tritonserver for all of them.
        """
        environ = os.environ if environ is None else environ
        given = environ.get(FOLDER_VARIABLE, "")
        if given:
            return cls(Path(given))
        parent = os.getppid()
        # The start time tells apart two servers that had the same process id one after the other.
        name = f"turbo-cancellations-{os.getuid()}-{parent}-{_start_time(parent)}"
        return cls(Path(tempfile.gettempdir()) / name)

    def request(self, key: str) -> None:
        """Asks for the request of that key to be ended. Asking twice changes nothing.

        Raises:
            InvalidArgument: the key is empty or longer than `MAX_KEY_BYTES`.
            OSError: the folder cannot be written to.
        """
        file = self._file(key)
        self._folder.mkdir(mode=0o700, exist_ok=True)  # another process may have closed it
        self._forget_old()
        file.touch()

    def is_requested(self, key: str) -> bool:
        """Whether the request of that key is to be ended; a key that could not have been filed never is."""
        return _is_key(key) and os.path.exists(self._file(key))

    def keep(self, key: str) -> None:
        """Keeps what is filed under a key from being forgotten as old; files nothing."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._file(key))

    def forget(self, *keys: str) -> None:
        """Removes cancellations that have been carried out or came too late; absent and empty keys are passed over."""
        for key in keys:
            if _is_key(key):
                self._file(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder if nothing is filed in it; for a model process that ends without a launcher."""
        with contextlib.suppress(OSError):  # other processes have removed it, or still use it
            self._folder.rmdir()

    def _file(self, key: str) -> Path:
        """Any key makes a safe name once it is hashed."""
        if not _is_key(key):
            shown = key if len(key) <= 80 else f"{key[:80]}..."
            raise InvalidArgument("request id", shown, f"1 to {MAX_KEY_BYTES} bytes long")
        return self._folder / hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()

    def _forget_old(self) -> None:
        oldest = time.time() - _KEPT_SECONDS
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # its request has just ended
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        os.unlink(entry.path)


def _is_key(key: str) -> bool:
    return 0 < len(key.encode("utf-8", "surrogatepass")) <= MAX_KEY_BYTES


def _start_time(pid: int) -> str:
    """When a process began, in clock ticks since the machine did; as /proc gives it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[19]
