"""Fixtures of the client's tests; the server they start is in fake_triton.py."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves sibling modules off the path

from fake_triton import MANIFEST, FakeTriton, make_mp4, start_server


@pytest.fixture(scope="session")
def mp4() -> bytes:
    return make_mp4(json.dumps(MANIFEST, ensure_ascii=False))


@pytest.fixture
def fake(mp4: bytes) -> Iterator[FakeTriton]:
    service = FakeTriton(mp4)
    server = start_server(service)
    yield service
    service.stream_ended.set()
    server.stop(None).wait()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens: bound, so that nobody else takes it, but not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"
