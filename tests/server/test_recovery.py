"""The real server with the tiny model breaks, and goes on: model processes die, requests leak, SIGTERM comes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from processes import find_processes
from tritonclient.grpc import service_pb2, service_pb2_grpc

from turbo_backend.errors import Misconfigured
from turbo_backend.server.process import TritonServer
from turbo_backend.settings import list_variables
from turbo_client import Client, InternalError, UnavailableError, UnreachableError

pytestmark = pytest.mark.server

Leftovers = Callable[[str], list[str]]

TINY = {**{variable.name: "" for variable in list_variables()}, "TURBO_DEVICE": "cpu"}
REQUEST = {"prompt": "A red fox runs through snow", "seed": 5, "num_steps": 2, "num_frames": 17}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, leftovers: Leftovers) -> Iterator[TritonServer]:
    log_path = tmp_path_factory.mktemp("recovery") / "server.log"
    with TritonServer(environment=TINY, log_path=log_path, ready_timeout=120, exit_timeout=120, restarts=5) as server:
        yield server
        prefix = server.shm_prefix
        assert server.stop() == 0
    assert leftovers(prefix) == []


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=120) as client:
        yield client


@pytest.mark.parametrize("model", ["denoiser", "vae_decoder"])
def test_a_killed_model_process_ends_its_request_and_the_server_comes_back(
    server: TritonServer, client: Client, leftovers: Leftovers, caplog: pytest.LogCaptureFixture, model: str
) -> None:
    before = client.generate(**REQUEST)
    url, prefix, pid = server.grpc_url, server.shm_prefix, find_processes(server.pid)[model]
    with client.stream(**REQUEST) as stream:
        for progress in stream:
            if progress.stage == model:
                break
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((InternalError, UnavailableError, UnreachableError)):
            stream.result()
    client.wait_ready(timeout=120)
    assert client.generate(**REQUEST).data == before.data
    assert server.grpc_url == url
    assert server.poll() is None
    assert f"the process of model '{model}' (pid {pid}) died of SIGKILL; restarting tritonserver" in caplog.text
    assert leftovers(prefix) == [], "nothing is left of the server that broke"


def test_a_model_process_is_named_though_tritonserver_aborts_at_once(
    server: TritonServer, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """As Triton 2.51 may when a model process dies."""
    before = client.generate(**REQUEST)
    pid = find_processes(server.pid)["text_encoder"]
    assert server.pid is not None
    os.kill(pid, signal.SIGKILL)
    os.kill(server.pid, signal.SIGABRT)
    while "restarting tritonserver" not in caplog.text:
        time.sleep(0.05)
    client.wait_ready(timeout=120)
    assert client.generate(**REQUEST).data == before.data
    assert f"the process of model 'text_encoder' (pid {pid}) died of SIGKILL; restarting tritonserver" in caplog.text


def test_a_model_process_that_is_killed_ends_the_start(tmp_path: Path, leftovers: Leftovers) -> None:
    """Triton 2.51 may wait for it for ever."""
    server = TritonServer(environment=TINY, log_path=tmp_path / "server.log", ready_timeout=120, exit_timeout=120)
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(server.start)
        pid = None
        while pid is None and not start.done():
            time.sleep(0.02)
            pid = find_processes(server.pid).get("denoiser")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Misconfigured, match=rf"\(pid {pid}\) died of SIGKILL before tritonserver was ready"):
            start.result()
    assert leftovers(server.shm_prefix) == []


def test_a_model_reference_that_triton_leaks_does_not_hold_up_the_stop(tmp_path: Path, leftovers: Leftovers) -> None:
    """Triton 2.51 keeps the ensemble alive after a request whose PROMPT has the wrong type and size."""
    log = tmp_path / "server.log"
    with TritonServer(environment=TINY, log_path=log, ready_timeout=120, exit_timeout=120) as server:
        request = service_pb2.ModelInferRequest(model_name="text_to_video")
        request.inputs.add(name="PROMPT", datatype="FP32", shape=[1, 1])
        request.raw_input_contents.append(b"\0\0\0")
        with grpc.insecure_channel(server.grpc_url) as channel:
            (answer,) = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]))
        assert "PROMPT" in answer.error_message
        prefix = server.shm_prefix
        assert server.stop() == 0
    assert "Exit timeout expired" not in log.read_text()
    assert leftovers(prefix) == []


def test_a_model_process_that_died_does_not_hold_up_the_stop(tmp_path: Path, leftovers: Leftovers) -> None:
    log = tmp_path / "server.log"
    with TritonServer(environment=TINY, log_path=log, ready_timeout=120, exit_timeout=120) as server:
        os.kill(find_processes(server.pid)["denoiser"], signal.SIGSEGV)
        prefix = server.shm_prefix
        assert server.stop() == 0
    assert "Exit timeout expired" not in log.read_text()
    assert leftovers(prefix) == []


def test_sigterm_lets_a_generation_finish(leftovers: Leftovers) -> None:
    command = Path(sys.executable).with_name("turbodiffusion-server")
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    with subprocess.Popen(
        [command, "serve", *ports],
        env={**os.environ, **TINY},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        ready = re.match(r"ready grpc=(\S+) .* pid=(\d+)\n", process.stdout.readline())
        assert ready is not None
        words = Path(f"/proc/{ready[2]}/cmdline").read_text().split("\0")
        (prefix,) = [word.removeprefix("--id=") for word in words if word.startswith("--id=")]
        with Client(ready[1], timeout=120) as client:
            expected = client.generate(**REQUEST)
            with client.stream(**REQUEST) as stream:
                next(progress for progress in stream if progress.stage == "denoiser")
                process.send_signal(signal.SIGTERM)
                video = stream.result()
        assert process.wait() == 0
    assert video.data == expected.data
    assert leftovers(f"{prefix}_") == []
