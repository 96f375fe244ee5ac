"""A tritonserver process: started, waited for, restarted when it breaks, stopped, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from turbo_backend.cancellation import FOLDER_VARIABLE, STOPPING, Cancellations
from turbo_backend.errors import Misconfigured
from turbo_backend.server import supervisor
from turbo_backend.server.backend_directory import (
    assemble_backend_directory,
    check_installation,
    server_environment,
)
from turbo_backend.server.binary import TritonInstallation, find_triton
from turbo_backend.server.drain import wait_until_quiet
from turbo_backend.server.ports import choose_ports, is_free
from turbo_backend.server.repository import FOLDER_NAME, find_model_repository, render_repository
from turbo_backend.server.watchdog import ModelProcesses, Watchdog
from turbo_backend.settings import Settings

logger = logging.getLogger(__name__)

#: Shared memory of each model process, in bytes, really taken from /dev/shm: at first, and whenever more is needed.
#: Latents of 720p x 81 frames are 19 MB in fp32 and the text embeddings of a prompt at most 8 MB, so one step of
#: growth holds any tensor but raw frames.
SHM_DEFAULT_BYTES = 8 << 20
SHM_GROWTH_BYTES = 32 << 20

#: Options that this class sets, and what to use instead.
_OWN_OPTIONS = {
    "model-repository": "--model-repository of turbodiffusion-server",
    "model-store": "--model-repository of turbodiffusion-server",
    "backend-directory": "the one beside --tritonserver",
    "http-address": "--host",
    "grpc-address": "--host",
    "metrics-address": "--host",
    "http-port": "--http-port of turbodiffusion-server, before `--`",
    "grpc-port": "--grpc-port of turbodiffusion-server, before `--`",
    "metrics-port": "--metrics-port of turbodiffusion-server, before `--`",
    "allow-http": "nothing: readiness is asked for over HTTP",
    "exit-timeout-secs": "--exit-timeout",
    "log-verbose": "--log-verbose of turbodiffusion-server, before `--`",
}
_START_ATTEMPTS = 5
#: Folder that the model processes share, beside the server's other temporary ones.
_CANCELLATIONS = "cancellations"
#: How long it takes at most to see that nothing is in flight.
_IDLE_LOOK_SECONDS = 0.65
_TAIL_BYTES = 1 << 16
_TAIL_LINES = 30
_TAIL_WIDTH = 400


class TritonServer:
    """One tritonserver on one model repository; a context manager that starts and stops it.

        with TritonServer(repository, environment={"TURBO_MODEL": "tiny"}) as server:
            client = InferenceServerClient(server.grpc_url)

    Args:
        model_repository: folder of models, served as it is; when absent, what the chosen network takes of the
            committed one.
        installation: which tritonserver; found by `find_triton` when absent.
        host: address to listen on; loopback unless chosen otherwise.
        http_port, grpc_port, metrics_port: 0 takes a free port.
        environment: variables added to this process's own.
        options: more options of tritonserver, as `--name=value` or `--name`, `value`.
        log_path: file that takes all that the server and its models print; a temporary one, removed at the stop,
            when absent. Its end is in the message of an error.
        log_to_stderr: print to standard error instead.
        log_verbose: Triton's log level.
        ready_timeout: seconds in which every model must be loaded and warm.
        exit_timeout: seconds that requests in flight may hold up a stop.
        restarts: how often in ten minutes the server is restarted, on the same ports, when it or one of its model
            processes dies; at the next death it ends for good. Absent: nobody looks, and Triton stays as it is.
        restart_grace: seconds that requests in flight may still take when a model process has died: Triton would never
            end by itself then.

    Attributes:
        grpc_url, http_url, metrics_url: where it listens; gRPC as `host:port`, the others with scheme.
        pid: of tritonserver itself while it runs.
        log_path: as given, or where the temporary log is; None with `log_to_stderr`.
    """

    def __init__(
        self,
        model_repository: Path | None = None,
        *,
        installation: TritonInstallation | None = None,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        log_path: Path | None = None,
        log_to_stderr: bool = False,
        log_verbose: int = 0,
        ready_timeout: float = 600.0,
        exit_timeout: float = 30.0,
        restarts: int | None = None,
        restart_grace: float = 5.0,
    ) -> None:
        _check_options(options)
        if log_to_stderr and log_path is not None:
            raise ValueError("log_path and log_to_stderr exclude each other")
        self.model_repository = find_model_repository(model_repository)
        self._renders = model_repository is None
        self.host = host
        self.log_path = log_path
        self.pid: int | None = None
        self._log_to_stderr = log_to_stderr
        self._log_is_temporary = log_path is None and not log_to_stderr
        self._log: IO[bytes] | None = None
        self._installation = installation
        self._requested_ports = (http_port, grpc_port, metrics_port)
        self._ports: tuple[int, ...] = self._requested_ports
        self._environment = dict(environment or {})
        self._options = list(options)
        self._log_verbose = log_verbose
        self._ready_timeout = ready_timeout
        self._exit_timeout = exit_timeout
        self._restarts = restarts
        self._restart_grace = restart_grace
        self._watchdog: Watchdog | None = None
        self._stopping = threading.Event()
        self._models: ModelProcesses | None = None
        self._final_code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._folder: Path | None = None
        self._server_id = ""

    @property
    def http_url(self) -> str:
        return f"http://{_address(self.host, self._ports[0])}"

    @property
    def grpc_url(self) -> str:
        return _address(self.host, self._ports[1])

    @property
    def metrics_url(self) -> str:
        return f"http://{_address(self.host, self._ports[2])}/metrics"

    @property
    def cancellations(self) -> Cancellations:
        """Where requests of the running server are given up, by their id."""
        assert self._folder is not None
        return Cancellations(self._folder / _CANCELLATIONS)

    @property
    def shm_prefix(self) -> str:
        """What the names of this server's files in /dev/shm begin with."""
        return f"{self._server_id}_"

    @property
    def version(self) -> str:
        """Triton's version, as the running server gives it."""
        status, body = self._get("/v2")
        if status != 200:
            raise RuntimeError(f"{self.http_url}/v2 answers with status {status}")
        return str(json.loads(body)["version"])

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, on_ready: Callable[[], None] | None = None) -> None:
        """Starts the server and returns when every model is ready.

        Args:
            on_ready: called then, and again after each restart (from another thread).

        Raises:
            Misconfigured: it cannot be started, ended by itself, or was not ready in time; with the log's end
                where the log is a file. Nothing is left running.
        """
        if self._process is not None or self._watchdog is not None:
            raise RuntimeError("this server has been started already")
        self._stopping.clear()
        self._start_once(self._requested_ports)
        if on_ready is not None:
            on_ready()
        if self._restarts is None:
            return

        def restart() -> None:
            self._end(self._restart_grace)
            self._start_once(self._ports)
            if on_ready is not None:
                on_ready()

        self._watchdog = Watchdog(
            find_failure=self._find_failure,
            restart=restart,
            give_up=self._give_up,
            limit=self._restarts,
            stopping=self._stopping,
        )

    def poll(self) -> int | None:
        """The server's exit status, or None while it runs (or is restarted); 128 + N when signal N ended it."""
        if self._watchdog is not None:
            return self._final_code if self._watchdog.ended.is_set() else None
        return self._process.poll() if self._process is not None else None

    def wait(self, timeout: float | None = None) -> int:
        """Waits until the server has ended, for good, and everything of it is gone; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self._watchdog is not None:
            if not self._watchdog.ended.wait(timeout):
                raise subprocess.TimeoutExpired("tritonserver", timeout or 0.0)
            return self._final_code or 0
        if self._process is None:
            raise RuntimeError("this server has not been started")
        return self._process.wait(timeout)

    def stop(self, timeout: float | None = None) -> int | None:
        """Stops the server: no new requests, those in flight may finish, then it is killed.

        Args:
            timeout: seconds until SIGKILL; `exit_timeout` and time for unloading when absent.

        Returns:
            Its exit status: 0 when it stopped with nothing left in flight, 137 when it was killed; None if it
            never ran.
        """
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        seconds = self._exit_timeout + 15.0 if timeout is None else timeout
        deadline = time.monotonic() + seconds
        ran = self._process is not None and self._process.poll() is None
        if ran and seconds > _IDLE_LOOK_SECONDS:
            self._end_jobs()
            self._drain(seconds)
        code = self._end(max(0.0, deadline - time.monotonic()))
        if ran and code == 137 and seconds > 0:
            logger.warning("tritonserver did not stop within %.1f s and was killed", seconds)
        return code

    def request_stop(self, timeout: float) -> None:
        """Tells the server to stop and returns at once; it is killed after `timeout` seconds."""
        control = self._control
        if control is not None:
            with contextlib.suppress(OSError):  # it has ended already
                control.sendall(f"stop {timeout}\n".encode("ascii"))

    def _find_failure(self) -> str | None:
        """What has died of a server that was ready, in words."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            return f"tritonserver ended by itself with status {code}"
        assert self._models is not None
        return self._models.find_dead()

    def _give_up(self) -> None:
        self._final_code = self._end(self._restart_grace)

    def _start_once(self, ports: tuple[int, ...]) -> None:
        installation = self._installation or find_triton()
        check_installation(installation)
        deadline = time.monotonic() + self._ready_timeout
        for attempt in range(_START_ATTEMPTS):
            self._ports = choose_ports(self.host, ports)
            try:
                self._launch(installation)
                if self._wait_ready(deadline):
                    assert self.pid is not None
                    self._models = ModelProcesses(self.pid)
                    return
            except BaseException:
                self._end(0)
                raise
            code = self._process.returncode if self._process is not None else None
            lost = [port for port in self._ports if not is_free(self.host, port)]
            tail = self._log_tail()
            self._end(0)
            if lost and 0 in ports and attempt + 1 < _START_ATTEMPTS:
                logger.warning("port %s was taken by another process; starting anew", ", ".join(map(str, lost)))
                continue
            raise Misconfigured(f"tritonserver ended with status {code} before it was ready{tail}")

    def _end_jobs(self) -> None:
        """Tells the jobs that the server stops: they go on with its next start, and need not be waited for."""
        with contextlib.suppress(OSError):  # on a full disk they are waited for
            self.cancellations.request(STOPPING)

    def _drain(self, seconds: float) -> None:
        """Begins the stop and returns when what is in flight has ended; see `turbo_backend.server.drain`."""
        process, pid = self._process, self.pid
        assert process is not None
        assert pid is not None

        def has_ended() -> bool:
            return process.poll() is not None

        if wait_until_quiet(pid, _IDLE_LOOK_SECONDS, has_ended):
            return
        held = http.client.HTTPConnection(_reachable(self.host), self._ports[0], timeout=5.0)
        try:
            held.request("GET", "/v2/health/live")
            held.getresponse().read()
            self.request_stop(seconds)
            wait_until_quiet(pid, seconds, has_ended)
        except (OSError, http.client.HTTPException) as error:
            logger.warning("requests in flight may be lost, because tritonserver does not answer: %s", error)
        finally:
            held.close()

    def _end(self, seconds: float) -> int | None:
        """Stops the process, if there is one, and removes what it leaves; returns its exit status."""
        process = self._process
        if process is None:
            return None
        self.request_stop(seconds)
        code = process.wait()
        if code < 0 and self.pid is not None:  # the supervisor was killed: nobody else ends model processes that hang
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._control is not None:
            self._control.close()
            self._control = None
        # The supervisor has done this already, unless it was killed itself.
        supervisor.remove_shared_memory(self.shm_prefix)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = None
        self._models = None
        self.pid = None
        return code

    def _launch(self, installation: TritonInstallation) -> None:
        self._server_id = f"turbo-{os.getpid()}-{secrets.token_hex(4)}"
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._server_id}-"))
        backends = assemble_backend_directory(installation, self._folder)
        environment = server_environment(installation, self._folder, {**os.environ, **self._environment})
        environment[FOLDER_VARIABLE] = str(self._folder / _CANCELLATIONS)
        ours, theirs = socket.socketpair()
        arguments = [
            sys.executable, "-I", "-S", supervisor.__file__,
            str(theirs.fileno()), str(self._exit_timeout + 15.0), self.shm_prefix, str(self._folder),
            str(installation.binary), *self._server_options(self._served_repository(), backends),
        ]  # fmt: skip
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (our own supervisor with checked options)
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=self._open_log(),
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._control = ours
        first_line = ours.makefile("rb").readline()
        if not first_line:
            raise Misconfigured(f"tritonserver could not be started{self._log_tail()}")
        self.pid = int(first_line)

    def _served_repository(self) -> Path:
        """The repository as given, or what the networks of the settings take of the committed one."""
        if not self._renders:
            return self.model_repository
        assert self._folder is not None
        settings = Settings.from_environment({**os.environ, **self._environment})
        return render_repository(self.model_repository, settings.served_models, self._folder / FOLDER_NAME)

    def _server_options(self, repository: Path, backends: Path) -> list[str]:
        http_port, grpc_port, metrics_port = self._ports
        options = [
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--metrics-address={self.host}",
            f"--http-port={http_port}",
            f"--grpc-port={grpc_port}",
            f"--metrics-port={metrics_port}",
            f"--exit-timeout-secs={round(self._exit_timeout)}",
            # Completing a configuration starts each Python model once more, only to ask it; ours are complete.
            "--disable-auto-complete-config",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,shm-default-byte-size={SHM_DEFAULT_BYTES}",
            f"--backend-config=python,shm-growth-byte-size={SHM_GROWTH_BYTES}",
        ]
        if not _names_option(self._options, "id"):
            options.append(f"--id={self._server_id}")
        if self._log_verbose:
            options.append(f"--log-verbose={self._log_verbose}")
        return options + self._options

    def _wait_ready(self, deadline: float) -> bool:
        """True when every model is ready, False when the server ended first.

        Raises:
            Misconfigured: neither happened before `deadline`.
        """
        pause = 0.02
        assert self._process is not None
        while self._process.poll() is None:
            if self._stopping.is_set():
                raise Misconfigured("told to stop while it was restarted")
            if self._is_ready():
                return True
            if time.monotonic() >= deadline:
                raise Misconfigured(f"tritonserver was not ready within {self._ready_timeout:.0f} s{self._log_tail()}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)
        return False

    def _is_ready(self) -> bool:
        status, _ = self._get("/v2/health/ready")
        if status != 200:
            return False
        # Another Triton may have taken the port before this one could: ask for the name.
        status, body = self._get("/v2")
        return status != 200 or _names_option(self._options, "id") or json.loads(body)["name"] == self._server_id

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(_reachable(self.host), self._ports[0], timeout=5.0)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _open_log(self) -> int:
        if self._log_to_stderr:
            return sys.stderr.fileno()
        if self._log_is_temporary:
            assert self._folder is not None
            self.log_path = self._folder / "server.log"
        assert self.log_path is not None
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log_path.open("a+b")
        return self._log.fileno()

    def _log_tail(self) -> str:
        """The log's last lines; read through the open file, because a temporary one is removed with the server."""
        if self._log is None:
            return ""
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _TAIL_BYTES))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        told = [
            line if len(line) <= _TAIL_WIDTH else f"{line[:_TAIL_WIDTH]} ..." for line in lines if _is_telling(line)
        ]
        return "; the end of its log:\n" + "\n".join(told[-_TAIL_LINES:])


def _is_telling(line: str) -> bool:
    """False for what says nothing about a failure: Triton's tables and its remarks on normal progress."""
    return bool(line.strip()) and not re.match(
        r"\||\+--|I\d{4} \S+ \d+ (?!pb_stub)|Error: Failed to initialize NVML|  <frozen importlib", line
    )


def _check_options(options: Sequence[str]) -> None:
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        if option.startswith("--") and name in _OWN_OPTIONS:
            raise Misconfigured(f"--{name} is set by turbodiffusion-server; use {_OWN_OPTIONS[name]}")


def _names_option(options: Sequence[str], name: str) -> bool:
    return any(option == f"--{name}" or option.startswith(f"--{name}=") for option in options)


def _address(host: str, port: int) -> str:
    reachable = _reachable(host)
    return f"[{reachable}]:{port}" if ":" in reachable else f"{reachable}:{port}"


def _reachable(host: str) -> str:
    """Where a server that listens on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (compared, not bound)
