"""Where a server is reached, and what it says over HTTP."""

from __future__ import annotations

import http.client
import json

_TIMEOUT_SECONDS = 5.0


def address(host: str, port: int) -> str:
    """`host:port` as a client of this machine writes it."""
    reachable = reachable_host(host)
    return f"[{reachable}]:{port}" if ":" in reachable else f"{reachable}:{port}"


def reachable_host(host: str) -> str:
    """Where a server that listens on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (compared, not bound)


def connect(host: str, port: int) -> http.client.HTTPConnection:
    """A connection to open and close; none is made yet."""
    return http.client.HTTPConnection(reachable_host(host), port, timeout=_TIMEOUT_SECONDS)


def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body of the answer; status 0 where nobody answers."""
    connection = connect(host, port)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def is_ready(host: str, port: int, *, name: str | None) -> bool:
    """Whether every model of the server is ready.

    Args:
        name: what it must call itself: another Triton may have taken the port before this one could. None takes any.
    """
    status, _ = get(host, port, "/v2/health/ready")
    if status != 200:
        return False
    status, body = get(host, port, "/v2")
    return status != 200 or name is None or json.loads(body)["name"] == name
