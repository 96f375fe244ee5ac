"""`TritonServer` on a real tritonserver: it starts, says why it cannot, stops, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc

from turbo_backend.errors import Misconfigured
from turbo_backend.server.process import TritonServer

pytestmark = pytest.mark.server

#: What the fixtures of these names are.
WriteModel = Callable[..., Path]
Leftovers = Callable[[str], list[str]]


def call(channel: grpc.Channel, model: str, value: float, *metadata: tuple[str, str]) -> float:
    """One request over the stream; its first answer."""
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="X", datatype="FP32", shape=[1]).contents.fp32_contents.append(value)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    (answer,) = stub.ModelStreamInfer(iter([request]), metadata=metadata)
    assert not answer.error_message
    (number,) = memoryview(answer.infer_response.raw_output_contents[0]).cast("f")
    return float(number)


@pytest.fixture(scope="module")
def server(write_model: WriteModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("running")
    repository = write_model(folder / "repository", "echo")
    with TritonServer(repository, log_path=folder / "server.log", ready_timeout=60) as server:
        yield server
        server.stop(0)


def test_serves_on_three_free_loopback_ports(server: TritonServer) -> None:
    ports = [int(url.removesuffix("/metrics").rpartition(":")[2]) for url in
             (server.http_url, server.grpc_url, server.metrics_url)]  # fmt: skip
    assert len(set(ports)) == 3
    assert all("127.0.0.1" in url for url in (server.http_url, server.grpc_url, server.metrics_url))
    with grpc.insecure_channel(server.grpc_url) as channel:
        assert call(channel, "echo", 1.5) == 1.5
    assert json.loads(fetch(f"{server.http_url}/v2"))["name"] == server.shm_prefix.rstrip("_")
    assert b'nv_inference_count{model="echo"' in fetch(server.metrics_url)


def test_names_its_process_and_its_log(server: TritonServer, leftovers: Leftovers) -> None:
    assert server.pid is not None
    assert (Path("/proc") / str(server.pid) / "comm").read_text().strip() == "tritonserver"
    assert server.log_path is not None
    assert "successfully loaded 'echo'" in server.log_path.read_text()
    assert server.poll() is None
    assert leftovers(server.shm_prefix)


def test_refuses_a_port_that_is_taken(server: TritonServer) -> None:
    port = int(server.grpc_url.rpartition(":")[2])
    with pytest.raises(Misconfigured, match=f"port {port} on 127.0.0.1 is in use"):
        TritonServer(server.model_repository, grpc_port=port).start()


def test_stop_lets_a_request_finish_and_leaves_nothing(
    tmp_path: Path, write_model: WriteModel, leftovers: Leftovers
) -> None:
    repository = write_model(tmp_path, "slow")
    with (
        TritonServer(repository, ready_timeout=60) as server,
        ThreadPoolExecutor() as pool,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        answer = pool.submit(call, channel, "slow", 1.5)
        wait_for_request(repository)
        assert server.stop() == 0
        assert answer.result() == 1.5
    assert leftovers(server.shm_prefix) == []
    assert server.poll() is None
    assert server.log_path is not None
    assert not server.log_path.exists(), "a temporary log goes with its server"


def test_stop_kills_what_does_not_end_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write_model: WriteModel, leftovers: Leftovers
) -> None:
    repository = write_model(tmp_path, "slow")
    with TritonServer(repository, ready_timeout=60) as server, grpc.insecure_channel(server.grpc_url) as channel:
        caller = threading.Thread(target=expect_lost, args=(channel,))
        caller.start()
        wait_for_request(repository)
        assert server.stop(0.5) == 137
        caller.join()
    assert "did not stop within 0.5 s and was killed" in caplog.text
    assert leftovers(server.shm_prefix) == []


def test_the_server_dies_with_its_supervisor(tmp_path: Path, write_model: WriteModel, leftovers: Leftovers) -> None:
    with TritonServer(write_model(tmp_path, "echo"), ready_timeout=60) as server:
        status = Path(f"/proc/{server.pid}/status").read_text()
        (supervisor,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")]
        os.kill(supervisor, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        while any("tritonserver" in line or "stub" in line for line in leftovers(server.shm_prefix)):
            time.sleep(0.05)
    assert leftovers(server.shm_prefix) == []


def test_gives_up_when_it_dies_too_often(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write_model: WriteModel, leftovers: Leftovers
) -> None:
    ready = threading.Semaphore(0)
    server = TritonServer(write_model(tmp_path, "echo"), ready_timeout=60, restarts=1)
    server.start(on_ready=ready.release)
    for _ in range(2):
        ready.acquire()
        assert server.poll() is None
        assert server.pid is not None
        prefix = server.shm_prefix
        os.kill(server.pid, signal.SIGKILL)
    assert server.wait() == 137
    assert server.poll() == 137
    assert "ended by itself with status 137; giving up after 1 restarts in 10 minutes" in caplog.text
    assert leftovers(prefix) == []
    assert server.stop() is None


def test_stop_ends_a_restart_that_is_under_way(tmp_path: Path, write_model: WriteModel, leftovers: Leftovers) -> None:
    """The model loads once, and never again."""
    code = """
        import pathlib, time

        class TritonPythonModel:
            def initialize(self, args):
                folder = pathlib.Path(__file__).parent
                if (folder / "first").exists():
                    (folder / "again").touch()
                    time.sleep(600)
                (folder / "first").touch()

            execute = None
    """
    ours = f"turbo-{os.getpid()}-"
    before = set(leftovers(ours))
    repository = write_model(tmp_path, "once", code)
    with TritonServer(repository, ready_timeout=60, restarts=1) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        while not (repository / "once" / "1" / "again").exists():
            time.sleep(0.02)
        server.stop()
    assert set(leftovers(ours)) <= before


def test_early_failure_shows_the_end_of_the_log(tmp_path: Path, write_model: WriteModel, leftovers: Leftovers) -> None:
    code = "class TritonPythonModel:\n    def initialize(self, args):\n        raise ValueError('no such weights')\n"
    server = TritonServer(write_model(tmp_path, "broken", code + "    execute = None\n"), ready_timeout=60)
    with pytest.raises(Misconfigured, match=r"ended with status 1 before it was ready(.|\n)*no such weights"):
        server.start()
    assert leftovers(server.shm_prefix) == []


def test_what_cannot_even_be_launched_leaves_nothing(leftovers: Leftovers) -> None:
    ours = f"turbo-{os.getpid()}-"
    before = leftovers(ours)
    with pytest.raises(Misconfigured, match="TURBO_MODEL = 'none'"):
        TritonServer(environment={"TURBO_MODEL": "none"}).start()
    assert leftovers(ours) == before


def test_why_models_cannot_be_loaded_is_told(tmp_path: Path, leftovers: Leftovers) -> None:
    """Without the log, which the caller may have sent elsewhere."""
    environment = {"TURBO_MODEL": "tiny", "TURBO_CHECKPOINT_DIR": str(tmp_path)}
    server = TritonServer(environment=environment, ready_timeout=120)
    with pytest.raises(Misconfigured) as caught:
        server.start()
    reasons = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in reasons if "cannot be loaded" in line]
    assert "end of its log" not in str(caught.value)
    assert "tiny-T2V" in str(caught.value)
    assert leftovers(server.shm_prefix) == []


def test_gives_up_on_a_model_that_loads_too_long(tmp_path: Path, write_model: WriteModel, leftovers: Leftovers) -> None:
    code = "import time\nclass TritonPythonModel:\n    def initialize(self, args):\n        time.sleep(600)\n"
    server = TritonServer(write_model(tmp_path, "endless", code + "    execute = None\n"), ready_timeout=1)
    with pytest.raises(Misconfigured, match="not ready within 1 s"):
        server.start()
    assert leftovers(server.shm_prefix) == []


def test_starts_anew_when_a_free_port_was_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write_model: WriteModel, leftovers: Leftovers
) -> None:
    """The model takes the gRPC port of the first server that loads it, before that server can."""
    ours = f"turbo-{os.getpid()}-"
    before = set(leftovers(ours))
    code = f"""
    import os, pathlib, socket

    class TritonPythonModel:
        def initialize(self, args):
            first = pathlib.Path({str(tmp_path / "first")!r})
            if not first.exists():
                command = pathlib.Path(f"/proc/{{os.getppid()}}/cmdline").read_text().split(chr(0))
                first.write_text(next(word for word in command if word.startswith("--grpc-port=")))
                os.mkfifo({str(tmp_path / "fifo")!r})
                pathlib.Path({str(tmp_path / "fifo")!r}).read_bytes()

        execute = None
    """
    repository = write_model(tmp_path / "repository", "echo", code)
    with socket.socket() as thief:
        stealing = threading.Thread(target=steal_port, args=(thief, tmp_path))
        stealing.start()
        with TritonServer(repository, ready_timeout=60) as server:
            stealing.join()
            stolen = thief.getsockname()[1]
            assert server.grpc_url.rpartition(":")[2] != str(stolen)
            server.stop(0)
    assert set(leftovers(ours)) <= before, "nothing is left of either attempt"
    assert f"port {stolen} was taken by another process; starting anew" in caplog.text


def test_forwards_tls_options_of_triton(tmp_path: Path, write_model: WriteModel) -> None:
    """TLS on gRPC is Triton's own business; the launcher only passes it on."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    repository = write_model(tmp_path / "repository", "echo")
    options = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={tmp_path / 'cert.pem'}",
        "--grpc-server-key",
        str(tmp_path / "key.pem"),
        "--id=mine",
    ]
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with TritonServer(repository, options=options, ready_timeout=60) as server:
        with grpc.secure_channel(server.grpc_url, credentials) as channel:
            assert call(channel, "echo", 2.5) == 2.5
        with grpc.insecure_channel(server.grpc_url) as channel, pytest.raises(grpc.RpcError):
            call(channel, "echo", 2.5)
        server.stop(0)


def test_forwards_the_api_key_option_of_triton(tmp_path: Path, write_model: WriteModel) -> None:
    repository = write_model(tmp_path, "echo")
    options = ["--grpc-restricted-protocol=inference:api-key=secret"]
    with (
        TritonServer(repository, options=options, ready_timeout=60) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, "echo", 2.5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert call(channel, "echo", 2.5, ("triton-grpc-protocol-api-key", "secret")) == 2.5
        server.stop(0)


@pytest.mark.parametrize("option", ["--grpc-port=1", "--backend-directory", "--http-address=0.0.0.0"])
def test_refuses_options_it_sets_itself(tmp_path: Path, option: str, write_model: WriteModel) -> None:
    with pytest.raises(Misconfigured, match="is set by turbodiffusion-server"):
        TritonServer(write_model(tmp_path, "echo"), options=[option])


@pytest.mark.parametrize("content", ["absent", "empty"])
def test_refuses_a_repository_without_models(tmp_path: Path, content: str) -> None:
    with pytest.raises(Misconfigured, match="model repository"):
        TritonServer(tmp_path / "absent" if content == "absent" else tmp_path)


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:  # noqa: S310  (a loopback address that the server gave)
        body: bytes = response.read()
        return body


def wait_for_request(repository: Path) -> None:
    """Returns when the model `slow` is at work."""
    while not (repository / "slow" / "1" / "busy").exists():
        time.sleep(0.02)


def expect_lost(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError):
        call(channel, "slow", 600.0)


def steal_port(thief: socket.socket, folder: Path) -> None:
    while not (folder / "fifo").exists():
        time.sleep(0.01)
    thief.bind(("127.0.0.1", int((folder / "first").read_text().partition("=")[2])))
    thief.listen()
    (folder / "fifo").write_bytes(b"go")
