"""`tritonserver --model-repository=model_repository` without the launcher, as in a container of one's own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from turbo_backend.server.backend_directory import assemble_backend_directory, server_environment
from turbo_backend.server.binary import find_triton
from turbo_backend.server.ports import choose_ports
from turbo_backend.server.repository import find_model_repository
from turbo_backend.settings import list_variables
from turbo_client import Client

pytestmark = pytest.mark.server

DOCUMENTATION = Path(__file__).parents[2] / "docs/reliability.md"


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


class Addresses(NamedTuple):
    """Where the server listens, `host:port`."""

    grpc: str
    http: str


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    tmp_path = tmp_path_factory.mktemp("bare")
    installation = find_triton()
    backends = assemble_backend_directory(installation, tmp_path)
    http, grpc, metrics = choose_ports("127.0.0.1", (0, 0, 0))
    unset = {variable.name: "" for variable in list_variables()}
    environment = {**os.environ, **unset, "TURBO_DEVICE": "cpu", "TURBO_JOB_STORE": str(tmp_path / "jobs")}
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
        yield Addresses(grpc=f"127.0.0.1:{grpc}", http=f"127.0.0.1:{http}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log_path.read_text()
    finally:
        process.kill()
        process.wait()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"bare{os.getpid()}_")]  # noqa: S108


def test_it_serves_the_embedded_model(bare: Addresses) -> None:
    with Client(bare.grpc) as client:
        client.wait_ready()
        video = client.generate("A red kite over the sea", seed=7, num_steps=1, num_frames=5)
    assert video.report["model"] == "tiny"
    assert video.frames().shape[0] == 5


def test_jobs_over_unary_grpc(bare: Addresses) -> None:
    request = {"prompt": "A red kite over the sea", "seed": 7, "num_steps": 2, "num_frames": 5}
    with Client(bare.grpc, timeout=120) as client:
        assert client.jobs.submit(**request, request_id="kite").state in ("queued", "running")
        assert client.jobs.result("kite").data == client.generate(**request).data
        assert client.jobs.status("kite").state == "done"


def test_jobs_over_http_by_the_words_of_the_documentation(bare: Addresses) -> None:
    """The three calls that docs/reliability.md makes with curl, sent as they stand there."""
    bodies = re.findall(r"curl .*?/v2/models/jobs/infer -d '(.*?)'", DOCUMENTATION.read_text(), re.DOTALL)
    submit, status, result = [body.encode() for body in bodies]

    def call(body: bytes) -> tuple[dict[str, str], bytes]:
        """(answer's outputs, what follows the JSON)."""
        with urllib.request.urlopen(f"http://{bare.http}/v2/models/jobs/infer", body) as answer:
            content = answer.read()
            length = int(answer.headers.get("Inference-Header-Content-Length", len(content)))
        outputs = json.loads(content[:length])["outputs"]
        return {output["name"]: output["data"][0] for output in outputs if "data" in output}, content[length:]

    assert call(submit)[0] == {"STATE": "queued"}
    assert call(submit)[0]["STATE"] in ("queued", "running"), "sent twice, it is one job"
    while call(status)[0]["STATE"] != "done":  # pytest's own limit ends it
        time.sleep(0.05)
    with Client(bare.grpc, timeout=120) as client:
        assert call(result)[1][4:] == client.jobs.result("fox").data
