"""One run of tritonserver, under its supervisor, and everything that it leaves behind."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_backend import cancellation, start_failures
from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import Misconfigured
from turbo_backend.server import endpoint, supervisor
from turbo_backend.server.backend_directory import assemble_backend_directory, server_environment
from turbo_backend.server.binary import TritonInstallation
from turbo_backend.server.drain import wait_until_quiet
from turbo_backend.server.log_file import LogFile
from turbo_backend.server.options import names_option, server_options
from turbo_backend.server.repository import FOLDER_NAME, render_repository
from turbo_backend.settings import Settings
from turbo_backend.start_failures import StartFailures

logger = logging.getLogger(__name__)

#: Folder that the model processes share, beside the run's other temporary files.
_CANCELLATIONS = "cancellations"
_START_FAILURES = "start_failures.jsonl"
#: How long it takes at most to see that nothing is in flight.
IDLE_LOOK_SECONDS = 0.65


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What every run of one server has in common.

    Attributes:
        repository: folder of models.
        renders: serve what the networks of the settings take of it, in place of all.
        host: address to listen on.
        environment: variables added to this process's own.
        options: more options of tritonserver.
        log_path: file that takes what is printed; None for one in the run's folder.
        log_to_stderr: print to standard error instead.
        log_verbose: Triton's log level.
        exit_timeout: seconds that requests in flight may hold up a stop.
    """

    repository: Path
    renders: bool
    host: str
    environment: Mapping[str, str]
    options: Sequence[str]
    log_path: Path | None
    log_to_stderr: bool
    log_verbose: int
    exit_timeout: float

    @property
    def grace(self) -> float:
        """Seconds that a stop may take: for requests in flight, and for unloading."""
        return self.exit_timeout + 15.0


class TritonProcess:
    """A tritonserver that runs from here on, ready or not, until `end`.

    Attributes:
        name: what it calls itself; names of its files in /dev/shm begin with it.
        pid: of tritonserver itself.
        log_path: None where it prints to standard error.

    Raises:
        Misconfigured: it cannot be started; nothing is left behind.
    """

    def __init__(self, launch: Launch, installation: TritonInstallation, ports: tuple[int, ...]) -> None:
        self.name = f"turbo-{os.getpid()}-{secrets.token_hex(4)}"
        self._launch = launch
        self._ports = ports
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._log: LogFile | None = None
        self.log_path = None if launch.log_to_stderr else launch.log_path or self._folder / "server.log"
        self._start_failures = StartFailures(self._folder / _START_FAILURES)
        self._control, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove)
            with theirs:
                self._process = self._spawn(installation, theirs)
            undo.callback(self._process.wait)
            undo.callback(self.request_stop, 0)
            with self._control.makefile("rb") as lines:
                first_line = lines.readline()
            if not first_line:
                raise Misconfigured(f"tritonserver could not be started{self.log_tail()}")
            self.pid = int(first_line)
            undo.pop_all()

    @property
    def cancellations(self) -> Cancellations:
        """Where its requests are given up, by their id."""
        return Cancellations(self._folder / _CANCELLATIONS)

    @property
    def shm_prefix(self) -> str:
        """What the names of its files in /dev/shm begin with."""
        return f"{self.name}_"

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, waited for.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        return self._process.wait(timeout)

    def is_ready(self) -> bool:
        """Whether every model is."""
        name = None if names_option(self._launch.options, "id") else self.name
        return endpoint.is_ready(self._launch.host, self._ports[0], name=name)

    def log_tail(self) -> str:
        """The log's end for a message; empty where it is no file."""
        return "" if self._log is None else self._log.tail()

    def start_failures(self) -> str:
        """Why models could not be loaded, as they say; empty where none says anything."""
        return self._start_failures.read()

    def read_deaths(self) -> dict[int, int]:
        """Of a server that has ended by itself: which of its processes signals ended before, and their statuses."""
        with self._control.makefile("rb") as lines:
            return {int(pid): int(status) for _, pid, status in map(bytes.split, lines)}

    def request_stop(self, seconds: float) -> None:
        """Tells it to stop and returns at once; it is killed after so many seconds."""
        with contextlib.suppress(OSError):  # it has ended already
            self._control.sendall(f"stop {seconds}\n".encode("ascii"))

    def drain(self, seconds: float) -> None:
        """Begins the stop and returns when what is in flight has ended; see `turbo_backend.server.drain`."""

        def has_ended() -> bool:
            return self.poll() is not None

        if wait_until_quiet(self.pid, IDLE_LOOK_SECONDS, has_ended):
            return
        held = endpoint.connect(self._launch.host, self._ports[0])
        try:
            held.request("GET", "/v2/health/live")
            held.getresponse().read()
            self.request_stop(seconds)
            wait_until_quiet(self.pid, seconds, has_ended)
        except (OSError, http.client.HTTPException) as error:
            logger.warning("requests in flight may be lost, because tritonserver does not answer: %s", error)
        finally:
            held.close()

    def end(self, seconds: float) -> int:
        """Stops it, removes what it leaves, and returns its exit status."""
        self.request_stop(seconds)
        code = self._process.wait()
        if code < 0:  # the supervisor was killed: nobody else ends model processes that hang
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._remove()
        return code

    def _spawn(self, installation: TritonInstallation, control: socket.socket) -> subprocess.Popen[bytes]:
        launch = self._launch
        backends = assemble_backend_directory(installation, self._folder)
        environment = server_environment(installation, self._folder, {**os.environ, **launch.environment})
        environment[cancellation.FOLDER_VARIABLE] = str(self._folder / _CANCELLATIONS)
        environment[start_failures.FILE_VARIABLE] = str(self._folder / _START_FAILURES)
        options = server_options(
            self._served_repository(),
            backends,
            host=launch.host,
            ports=self._ports,
            exit_timeout=launch.exit_timeout,
            log_verbose=launch.log_verbose,
            server_id=self.name,
            shm_prefix=self.shm_prefix,
            given=launch.options,
        )
        arguments = [
            sys.executable, "-I", "-S", supervisor.__file__,
            str(control.fileno()), str(launch.grace), self.shm_prefix, str(self._folder),
            str(installation.binary), *options,
        ]  # fmt: skip
        return subprocess.Popen(  # noqa: S603  (our own supervisor with checked options)
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=self._open_log(),
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(control.fileno(),),
            start_new_session=True,
        )

    def _served_repository(self) -> Path:
        """The repository as given, or what the networks of the settings take of the committed one."""
        launch = self._launch
        if not launch.renders:
            return launch.repository
        settings = Settings.from_environment({**os.environ, **launch.environment})
        return render_repository(launch.repository, settings.served_models, self._folder / FOLDER_NAME)

    def _open_log(self) -> int:
        if self.log_path is None:
            return sys.stderr.fileno()
        self._log = LogFile(self.log_path)
        return self._log.fileno()

    def _remove(self) -> None:
        if self._log is not None:
            self._log.close()
        self._start_failures.close()
        self._control.close()
        # The supervisor has done this already, unless it was killed itself.
        supervisor.remove_shared_memory(self.shm_prefix)
        shutil.rmtree(self._folder, ignore_errors=True)
