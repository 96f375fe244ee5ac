"""Serves until told to stop: what `turbodiffusion-server serve` does once its options are read."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from turbo_backend.server.process import TritonServer

__all__ = ["TritonServer", "ready_line", "serve"]

#: Exit statuses: stopped as told (SIGTERM or Ctrl-C), failed, stopped at once by a second Ctrl-C.
EXIT_STOPPED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


class _StopRequested(BaseException):
    """SIGTERM or SIGINT has come."""


def ready_line(server: TritonServer, model: str) -> str:
    """The one line on standard output that says where a ready server listens, as `key=value` words."""
    return (
        f"ready grpc={server.grpc_url} http={server.http_url} metrics={server.metrics_url} "
        f"model={model} pid={server.pid}"
    )


def serve(server: TritonServer, model: str) -> int:
    """Starts `server`, prints `ready_line` each time that it is ready, and waits until a signal or its own end.

    SIGTERM and SIGINT stop it cleanly, also while it is still loading: requests in flight hold the stop up to the
    server's `exit_timeout`. A second one kills it.

    Returns:
        0 when it stopped as told, 1 when it ended for good by itself or had to be killed, 130 after a second signal.

    Raises:
        Misconfigured: it did not become ready.
    """
    signals_seen = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal signals_seen
        signals_seen += 1
        if signals_seen == 1:
            raise _StopRequested
        server.request_stop(0)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            server.start(lambda: print(ready_line(server, model), flush=True))
            code = server.wait()
        except _StopRequested:
            print("stopping: waiting for requests in flight; once more to stop at once", file=sys.stderr, flush=True)
        else:
            print(f"error: tritonserver is gone (status {code})", file=sys.stderr, flush=True)
            return EXIT_FAILED
        code = server.stop() or 0
        if signals_seen > 1:
            return EXIT_INTERRUPTED
        return EXIT_STOPPED if code in (0, 128 + signal.SIGTERM) else EXIT_FAILED
    finally:
        server.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
