"""Ports for a server that cannot be handed an open socket.

Triton takes port numbers, not sockets, so whoever chooses one for it can lose it again before Triton binds it. The
choice is made outside the range that the kernel hands out by itself, and the launcher tries anew when it lost one.
"""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from turbo_backend.errors import Misconfigured

_LOWEST = 10240
_ATTEMPTS = 200


def is_free(host: str, port: int) -> bool:
    """Whether `port` can be bound on `host` now.

    Raises:
        Misconfigured: `host` is no address of this machine, or the port may not be bound by this user.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise Misconfigured(f"host {host!r}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise Misconfigured(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return True


def choose_ports(host: str, requested: tuple[int, ...]) -> tuple[int, ...]:
    """The ports to use: each one asked for as it is, each 0 replaced by a free one.

    Raises:
        Misconfigured: a port asked for is taken, or asked for twice.
    """
    fixed = [port for port in requested if port]
    if len(set(fixed)) != len(fixed):
        raise Misconfigured(f"ports must differ, not {', '.join(map(str, fixed))}")
    for port in fixed:
        if not 0 < port < 65536:
            raise Misconfigured(f"port {port}: must be 1 to 65535, or 0 for a free one")
        if not is_free(host, port):
            raise Misconfigured(
                f"port {port} on {host} is in use: stop what listens there, or choose another (0: free)"
            )
    chosen: list[int] = []
    for port in requested:
        chosen.append(port or _choose_port(host, taken={*fixed, *chosen}))
    return tuple(chosen)


def _choose_port(host: str, taken: set[int]) -> int:
    lowest_ephemeral = _lowest_ephemeral_port()
    randomly = random.SystemRandom()
    for _ in range(_ATTEMPTS):
        port = randomly.randrange(_LOWEST, lowest_ephemeral)
        if port not in taken and is_free(host, port):
            return port
    raise Misconfigured(f"no free port on {host} between {_LOWEST} and {lowest_ephemeral}")


def _lowest_ephemeral_port() -> int:
    """Where the range begins from which the kernel gives outgoing connections their ports."""
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        lowest = 32768
    return lowest if lowest > _LOWEST + 1000 else 65536
