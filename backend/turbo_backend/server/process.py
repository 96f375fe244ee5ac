"""A tritonserver that is started, waited for, restarted when it breaks, and stopped, with nothing of it left behind."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from turbo_backend.cancellation import STOPPING, Cancellations
from turbo_backend.errors import Misconfigured
from turbo_backend.server import endpoint
from turbo_backend.server.backend_directory import check_installation
from turbo_backend.server.binary import TritonInstallation, find_triton
from turbo_backend.server.child import IDLE_LOOK_SECONDS, Launch, TritonProcess
from turbo_backend.server.options import check_options
from turbo_backend.server.ports import choose_ports, is_free
from turbo_backend.server.repository import find_model_repository
from turbo_backend.server.watchdog import LOOK_SECONDS, ModelProcesses, Watchdog

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 5


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
        log_path: as given, or where the temporary log is; None with `log_to_stderr`.
        shm_prefix: what the names of its files in /dev/shm begin with, since it was started.
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
        check_options(options)
        if log_to_stderr and log_path is not None:
            raise ValueError("log_path and log_to_stderr exclude each other")
        self.model_repository = find_model_repository(model_repository)
        self.host = host
        self.log_path = log_path
        self.shm_prefix = ""
        self._launch = Launch(
            repository=self.model_repository,
            renders=model_repository is None,
            host=host,
            environment=dict(environment or {}),
            options=tuple(options),
            log_path=log_path,
            log_to_stderr=log_to_stderr,
            log_verbose=log_verbose,
            exit_timeout=exit_timeout,
        )
        self._installation = installation
        self._requested_ports = (http_port, grpc_port, metrics_port)
        self._ports: tuple[int, ...] = self._requested_ports
        self._ready_timeout = ready_timeout
        self._restarts = restarts
        self._restart_grace = restart_grace
        self._watchdog: Watchdog | None = None
        self._stopping = threading.Event()
        self._final_code: int | None = None
        self._process: TritonProcess | None = None
        self._models: ModelProcesses | None = None

    @property
    def http_url(self) -> str:
        return f"http://{endpoint.address(self.host, self._ports[0])}"

    @property
    def grpc_url(self) -> str:
        return endpoint.address(self.host, self._ports[1])

    @property
    def metrics_url(self) -> str:
        return f"http://{endpoint.address(self.host, self._ports[2])}/metrics"

    @property
    def pid(self) -> int | None:
        """Of tritonserver itself while it runs."""
        return None if self._process is None else self._process.pid

    @property
    def cancellations(self) -> Cancellations:
        """Where requests of the running server are given up, by their id."""
        assert self._process is not None
        return self._process.cancellations

    @property
    def version(self) -> str:
        """Triton's version, as the running server gives it."""
        status, body = endpoint.get(self.host, self._ports[0], "/v2")
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
        process = self._process
        if process is None:
            return None
        seconds = self._launch.grace if timeout is None else timeout
        deadline = time.monotonic() + seconds
        ran = process.poll() is None
        if ran and seconds > IDLE_LOOK_SECONDS:
            with contextlib.suppress(OSError):  # on a full disk the jobs are waited for
                # They go on with the server's next start.
                process.cancellations.request(STOPPING)
            process.drain(seconds)
        code = self._end(max(0.0, deadline - time.monotonic()))
        if ran and code == 137 and seconds > 0:
            logger.warning("tritonserver did not stop within %.1f s and was killed", seconds)
        return code

    def request_stop(self, timeout: float) -> None:
        """Tells the server to stop and returns at once; it is killed after `timeout` seconds."""
        process = self._process
        if process is not None:
            process.request_stop(timeout)

    def _find_failure(self) -> str | None:
        """What has died of a server that was ready, in words."""
        assert self._process is not None
        assert self._models is not None
        code = self._process.poll()
        if code is None:
            return self._models.find_dead()
        died = self._models.find_among(self._process.read_deaths())
        return died or f"tritonserver ended by itself with status {code}"

    def _give_up(self) -> None:
        self._final_code = self._end(self._restart_grace)

    def _start_once(self, ports: tuple[int, ...]) -> None:
        installation = self._installation or find_triton()
        check_installation(installation)
        deadline = time.monotonic() + self._ready_timeout
        for attempt in range(_START_ATTEMPTS):
            self._ports = choose_ports(self.host, ports)
            process = self._process = TritonProcess(self._launch, installation, self._ports)
            self.log_path, self.shm_prefix = process.log_path, process.shm_prefix
            try:
                if self._wait_ready(process, deadline):
                    self._models = ModelProcesses(process.pid)
                    return
            except BaseException:
                self._end(0)
                raise
            code = process.poll()
            lost = [port for port in self._ports if not is_free(self.host, port)]
            reasons = process.start_failures()
            tail = process.log_tail()
            self._end(0)
            if lost and 0 in ports and attempt + 1 < _START_ATTEMPTS:
                logger.warning("port %s was taken by another process; starting anew", ", ".join(map(str, lost)))
                continue
            raise Misconfigured(reasons or f"tritonserver ended with status {code} before it was ready{tail}")

    def _wait_ready(self, process: TritonProcess, deadline: float) -> bool:
        """True when every model is ready, False when the server ended first.

        Raises:
            Misconfigured: a model process was killed, or neither happened before `deadline`.
        """
        models, looked, pause = ModelProcesses(process.pid), time.monotonic(), 0.02
        while process.poll() is None:
            if self._stopping.is_set():
                raise Misconfigured("told to stop while it was restarted")
            if process.is_ready():
                return True
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                death = models.find_dead(starting=True)
                if death is not None:
                    raise Misconfigured(process.start_failures() or f"{death} before tritonserver was ready")
            if time.monotonic() >= deadline:
                tail = process.log_tail()
                raise Misconfigured(f"tritonserver was not ready within {self._ready_timeout:.0f} s{tail}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)
        return False

    def _end(self, seconds: float) -> int | None:
        """Stops the process, if there is one; returns its exit status."""
        if self._process is None:
            return None
        code = self._process.end(seconds)  # which `request_stop` may still hurry
        self._process = self._models = None
        return code
