"""A server to put under load: the tiny model on the CPU, with a job store of its own."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from processes import find_leftovers, find_processes

from turbo_backend.server.process import TritonServer
from turbo_backend.settings import list_variables
from turbo_client import Client, RetryPolicy

#: Of a server that is whole.
PROCESSES = {"supervisor", "tritonserver", "text_encoder", "denoiser", "vae_decoder", "jobs"}


class JobServer:
    """One server and a client that sits out its restarts; a context manager.

    Args:
        folder: takes the store and the log.
        restarts: how often it may be restarted in ten minutes; absent: never.

    Attributes:
        server: the server.
        client: of it.
        store: folder of its jobs.
    """

    def __init__(self, folder: Path, *, restarts: int | None = None) -> None:
        self.store = folder / "jobs"
        self._log = folder / "server.log"
        self.server = TritonServer(
            environment={
                **{variable.name: "" for variable in list_variables()},
                "TURBO_DEVICE": "cpu",
                "TURBO_JOB_STORE": str(self.store),
                "TURBO_JOB_ATTEMPTS": "1000",
                "TURBO_JOB_CONCURRENCY": "4",
            },
            log_path=self._log,
            ready_timeout=120.0,
            exit_timeout=120.0,
            restarts=restarts,
            restart_grace=0.5,
        )
        # Each start takes a name of its own, but all begin alike.
        self._prefix = f"turbo-{os.getpid()}-"
        self._others = find_leftovers(self._prefix)

    def __enter__(self) -> JobServer:
        self.server.start()
        retries = RetryPolicy(max_attempts=60, initial_delay=0.25, max_delay=1.0)
        self.client = Client(self.server.grpc_url, timeout=300, retries=retries)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops it, unless that was done."""
        self.client.close()
        self.server.stop()

    @property
    def processes(self) -> dict[str, int]:
        """Ids of its living processes, by model; the supervisor among them."""
        return find_processes(self.server.pid)

    def wait_whole(self) -> None:
        """Returns when the server is ready and no process of it is missing.

        Raises:
            RuntimeError: it has ended for good.
        """
        while not (self.processes.keys() >= PROCESSES and self._is_ready()):
            if self.server.poll() is not None:
                raise RuntimeError(f"the server is gone: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def leftovers(self) -> list[str]:
        """What it has left behind, once it is stopped: processes, shared memory, temporary files."""
        temporary = {str(path) for path in self.store.rglob("*.part")}
        return sorted(find_leftovers(self._prefix) - self._others | temporary)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.server.http_url}/v2/health/ready", timeout=5) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
