"""Value objects that a client is configured with: time limits, TLS, retries."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """Time limits in seconds.

    Attributes:
        total: a whole generation, queueing and retries included; None for no limit.
        connect: one attempt to connect.
        status: each of the small calls behind `status()` and `wait_ready()`.
    """

    total: float | None = 600.0
    connect: float = 10.0
    status: float = 10.0

    def __post_init__(self) -> None:
        for name, value in (("total", self.total), ("connect", self.connect), ("status", self.status)):
            if value is not None and not value > 0:
                raise ValueError(f"Timeout.{name} = {value!r}: must be over 0 seconds")
        if not (math.isfinite(self.connect) and math.isfinite(self.status)):
            raise ValueError("Timeout.connect and Timeout.status must be finite")

    @classmethod
    def of(cls, value: Timeout | float | None) -> Timeout:
        """A number limits the whole generation; None takes that limit away."""
        return value if isinstance(value, Timeout) else cls(total=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """TLS towards the server; with `cert` and `key`, mutual TLS.

    Attributes:
        ca: PEM roots to trust (path or bytes); None trusts the roots that gRPC brings along.
        cert: the client's PEM certificate chain (path or bytes).
        key: the client's PEM private key (path or bytes).
        server_name: name to expect in the server's certificate, when it is not the host in the URL.
    """

    ca: str | os.PathLike[str] | bytes | None = None
    cert: str | os.PathLike[str] | bytes | None = None
    key: str | os.PathLike[str] | bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS.cert and TLS.key belong together: give both or neither")

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """(ca, key, cert) as PEM bytes.

        Raises:
            OSError: a file cannot be read.
            ValueError: what was given holds no PEM block; gRPC itself would only fail at the handshake, wordlessly.
        """
        return _pem("ca", self.ca), _pem("key", self.key), _pem("cert", self.cert)


def _pem(name: str, value: str | os.PathLike[str] | bytes | None) -> bytes | None:
    if value is None:
        return None
    content = value if isinstance(value, bytes) else Path(value).read_bytes()
    if b"-----BEGIN " not in content:
        shown = "the bytes given" if isinstance(value, bytes) else os.fspath(value)
        raise ValueError(f"TLS.{name}: {shown} holds no PEM block")
    return content


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a request that the server has not begun to answer is sent again.

    Only UNAVAILABLE is retried, only before the first response, and never an out-of-memory answer: a video is
    costly, so nothing that may have run is run twice.

    Attributes:
        max_attempts: attempts in all; 1 turns retrying off.
        initial_delay: upper bound in seconds of the first wait.
        multiplier: growth of that bound from wait to wait.
        max_delay: where it stops growing.
    """

    max_attempts: int = 3
    initial_delay: float = 0.25
    multiplier: float = 2.0
    max_delay: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"RetryPolicy.max_attempts = {self.max_attempts!r}: must be at least 1")
        if not (0 <= self.initial_delay <= self.max_delay < math.inf and 1 <= self.multiplier < math.inf):
            raise ValueError("RetryPolicy: needs 0 <= initial_delay <= max_delay and multiplier >= 1")

    def delay(self, attempt: int) -> float:
        """Seconds to wait after failed attempt number `attempt` (1 for the first).

        Drawn evenly from the upper half of the bound, so that clients that failed together do not return together.
        """
        bound = min(self.max_delay, self.initial_delay * self.multiplier ** (attempt - 1))
        return random.uniform(bound / 2, bound)  # noqa: S311 - spreads load, guards nothing
