"""`tritonserver --model-repository=model_repository` without the launcher, as in a container of one's own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbo_backend.server.backend_directory import assemble_backend_directory, server_environment
from turbo_backend.server.binary import find_triton
from turbo_backend.server.ports import choose_ports
from turbo_backend.server.repository import find_model_repository
from turbo_backend.settings import list_variables
from turbo_client import Client

pytestmark = pytest.mark.server


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture
def grpc_url(tmp_path: Path) -> Iterator[str]:
    installation = find_triton()
    backends = assemble_backend_directory(installation, tmp_path)
    http, grpc, metrics = choose_ports("127.0.0.1", (0, 0, 0))
    environment = {**os.environ, **{variable.name: "" for variable in list_variables()}, "TURBO_DEVICE": "cpu"}
    log_path = tmp_path / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                str(installation.binary), f"--model-repository={find_model_repository()}",
                f"--backend-directory={backends}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
                "--metrics-address=127.0.0.1", f"--http-port={http}", f"--grpc-port={grpc}",
                f"--metrics-port={metrics}", f"--backend-config=python,shm-region-prefix-name=bare{os.getpid()}_",
            ],
            env=server_environment(installation, tmp_path, environment),
            stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        give_up = time.monotonic() + 200
        while not is_ready(http):
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < give_up, log_path.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{grpc}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log_path.read_text()
    finally:
        process.kill()
        process.wait()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"bare{os.getpid()}_")]  # noqa: S108


def test_it_serves_the_embedded_model(grpc_url: str) -> None:
    with Client(grpc_url) as client:
        client.wait_ready()
        video = client.generate("A red kite over the sea", seed=7, num_steps=1, num_frames=5)
    assert video.report["model"] == "tiny"
    assert video.frames().shape[0] == 5
