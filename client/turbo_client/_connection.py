"""What both transports need to open a channel: target, credentials, options, metadata. No I/O but reading PEM files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import grpc

from turbo_client._settings import TLS, Timeout

_grpc: Any = grpc  # its functions carry no types

ChannelOption = tuple[str, str | int]
Metadata = tuple[tuple[str, str], ...]

_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything about the server that stays the same from call to call.

    Attributes:
        target: gRPC target.
        credentials: None for plaintext.
        options: channel arguments.
        metadata: headers of every call.
    """

    target: str
    credentials: Any
    options: tuple[ChannelOption, ...]
    metadata: Metadata = field(repr=False)

    @classmethod
    def to(
        cls,
        url: str,
        *,
        tls: TLS | None,
        timeout: Timeout,
        api_key: str | None,
        api_key_header: str,
        max_message_bytes: int | None,
        channel_options: Sequence[ChannelOption],
    ) -> Connection:
        """Checks and assembles a client's settings.

        Raises:
            ValueError: a URL, header or PEM content that cannot work.
            OSError: a PEM file cannot be read.
        """
        connect_ms = max(1, round(timeout.connect * 1000))
        limit = -1 if max_message_bytes is None else max_message_bytes
        options: list[ChannelOption] = [
            # Raw frames are large: 224 MB at 720p. Without this gRPC refuses answers over 4 MB.
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            # A server that is starting is found within a second or two, not after gRPC's two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # gRPC's least backoff is also how long it lets one attempt to connect take.
            ("grpc.min_reconnect_backoff_ms", min(connect_ms, 2_000_000_000)),
            # Retrying is `RetryPolicy`'s alone: gRPC cannot tell an out-of-memory UNAVAILABLE from a passing one.
            ("grpc.enable_retries", 0),
        ]
        credentials = None
        if tls is not None:
            ca, key, cert = tls.read()
            credentials = _grpc.ssl_channel_credentials(ca, key, cert)
            if tls.server_name is not None:
                options.append(("grpc.ssl_target_name_override", tls.server_name))
        return cls(
            target=_target(url),
            credentials=credentials,
            options=(*options, *channel_options),
            metadata=(*_key_header(api_key, api_key_header), ("triton_grpc_error", "true")),
        )

    def open(self, library: ModuleType) -> Any:
        """A channel of `grpc` or of `grpc.aio`, which open them alike."""
        transport: Any = library
        if self.credentials is None:
            return transport.insecure_channel(self.target, self.options)
        return transport.secure_channel(self.target, self.credentials, self.options)


def _target(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    if separator and scheme in ("http", "https"):
        raise ValueError(f"url = {url!r}: must be HOST:PORT of the server's gRPC port (8001 by default), not HTTP")
    if not url or any(character.isspace() for character in url):
        raise ValueError(f"url = {url!r}: must be HOST:PORT")
    if scheme == "grpc" and separator:
        return url.removeprefix("grpc://").rstrip("/")
    return url


def _key_header(api_key: str | None, header: str) -> Metadata:
    if api_key is None:
        return ()
    name = header.lower()
    if not _HEADER_NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
        raise ValueError(f"api_key_header = {header!r}: is not a usable header name")
    if not api_key or not all(" " <= character <= "~" for character in api_key):
        # The key itself stays out of the message.
        raise ValueError("api_key: must be printable ASCII and not empty")
    return ((name, f"Bearer {api_key}" if name == "authorization" else api_key),)
