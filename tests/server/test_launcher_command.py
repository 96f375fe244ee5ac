"""`turbodiffusion-server` as a process: its one line, its signals, its exit statuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turbo_backend.server.supervisor import child_states

pytestmark = pytest.mark.server

#: What the fixtures of these names are.
WriteModel = Callable[..., Path]
Leftovers = Callable[[str], list[str]]

COMMAND = [str(Path(sys.executable).with_name("turbodiffusion-server"))]
FREE_PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
READY = re.compile(
    r"ready grpc=127\.0\.0\.1:\d+ http=http://127\.0\.0\.1:\d+ metrics=http://127\.0\.0\.1:\d+/metrics "
    r"model=tiny pid=(\d+)\n"
)


@contextmanager
def launched(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own group, as a shell starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TURBO_")}
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_pid(process: subprocess.Popen[str]) -> int:
    """Tritonserver's process id, from the line that says it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    match = READY.fullmatch(line)
    assert match, (line, process.stderr and process.stderr.read())
    return int(match.group(1))


def shm_prefix(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    (name,) = [word.removeprefix("--id=") for word in words if word.startswith("--id=")]
    return f"{name}_"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(
    tmp_path: Path, write_model: WriteModel, leftovers: Leftovers, number: signal.Signals
) -> None:
    repository = write_model(tmp_path, "echo")
    # Without a subcommand: serve. The signal goes to the whole group, as a terminal's Ctrl-C does.
    with launched("--model-repository", str(repository), *FREE_PORTS, "--", "--log-info=true") as process:
        prefix = shm_prefix(read_pid(process))
        assert leftovers(prefix)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate()
    assert process.returncode == 0
    assert stdout == "", "one line and no more"
    assert "successfully loaded 'echo'" in stderr
    assert "stopping: waiting for requests in flight" in stderr
    assert leftovers(prefix) == []


def test_a_signal_stops_it_while_it_loads(tmp_path: Path, write_model: WriteModel, leftovers: Leftovers) -> None:
    code = """
        import os, pathlib, time

        class TritonPythonModel:
            def initialize(self, args):
                pathlib.Path(__file__).with_name("loading").write_text(str(os.getppid()))
                time.sleep(600)

            execute = None
    """
    repository = write_model(tmp_path, "endless", code)
    started = tmp_path / "endless" / "1" / "loading"
    with launched("serve", "--model-repository", str(repository), *FREE_PORTS) as process:
        while not (started.exists() and started.read_text()):
            time.sleep(0.02)
        prefix = shm_prefix(int(started.read_text()))
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate()
    assert process.returncode == 0
    assert stdout == ""
    assert leftovers(prefix) == []


def test_killing_the_launcher_stops_the_server(tmp_path: Path, write_model: WriteModel, leftovers: Leftovers) -> None:
    log = tmp_path / "server.log"
    repository = write_model(tmp_path / "repository", "echo")
    with launched("serve", "--model-repository", str(repository), *FREE_PORTS, "--log-file", str(log)) as process:
        prefix = shm_prefix(read_pid(process))
        process.kill()
        process.wait()
        while leftovers(prefix):  # pytest's own timeout ends a wait in vain
            time.sleep(0.05)
    assert "All models are stopped" in log.read_text(), "it was asked to stop before it was killed"


def model_process(server_pid: int) -> int:
    (pid,) = child_states(server_pid)
    return pid


@pytest.mark.parametrize("victim", ["server", "model process"])
def test_what_dies_is_restarted_on_the_same_ports(
    tmp_path: Path, write_model: WriteModel, leftovers: Leftovers, victim: str
) -> None:
    repository = write_model(tmp_path / "repository", "echo")
    log = tmp_path / "server.log"
    with launched("--model-repository", str(repository), *FREE_PORTS, "--log-file", str(log)) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        pid = int(first.rpartition("=")[2])
        prefix = shm_prefix(pid)
        killed = pid if victim == "server" else model_process(pid)
        os.kill(killed, signal.SIGKILL)
        second = process.stdout.readline()
        assert READY.fullmatch(second), second
        assert second.partition(" pid=")[0] == first.partition(" pid=")[0]
        assert second != first
        assert leftovers(prefix) == []
        prefix = shm_prefix(int(second.rpartition("=")[2]))
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
    assert process.returncode == 0
    assert leftovers(prefix) == []
    what = (
        "tritonserver ended by itself with status 137"
        if victim == "server"
        else f"the process of model 'echo' (pid {killed}) died of SIGKILL"
    )
    assert stderr.splitlines()[0] == f"{what}; restarting tritonserver (1 of at most 5)"


@pytest.mark.parametrize("victim", ["server", "model process"])
def test_no_restart_ends_the_launcher_instead(
    tmp_path: Path, write_model: WriteModel, leftovers: Leftovers, victim: str
) -> None:
    repository = write_model(tmp_path, "echo")
    with launched("serve", "--no-restart", "--model-repository", str(repository), *FREE_PORTS) as process:
        pid = read_pid(process)
        prefix = shm_prefix(pid)
        os.kill(pid if victim == "server" else model_process(pid), signal.SIGKILL)
        stdout, stderr = process.communicate()
    assert process.returncode == 1
    assert stdout == ""
    assert re.search(r"(status 137|died of SIGKILL); giving up\n", stderr)
    assert leftovers(prefix) == []


def test_a_second_signal_stops_it_at_once(tmp_path: Path, write_model: WriteModel, leftovers: Leftovers) -> None:
    code = """
        import time

        class TritonPythonModel:
            def execute(self, requests):
                return []

            def finalize(self):
                time.sleep(600)
    """
    repository = write_model(tmp_path, "stubborn", code)
    with launched("serve", "--model-repository", str(repository), *FREE_PORTS) as process:
        prefix = shm_prefix(read_pid(process))
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "stopping" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    assert leftovers(prefix) == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "Wan9"], 1, "TURBO_MODEL = 'Wan9': must be one of tiny"),
        (["--device", "tpu"], 1, "TURBO_DEVICE = 'tpu': must be auto, cpu, cuda or cuda:N"),
        (["--tritonserver", "/nowhere"], 1, "--tritonserver: /nowhere is not an executable file"),
        (["--auto", "--model", "tiny"], 1, "--auto chooses what TURBO_MODEL says already"),
        (["--auto", "--device", "cpu"], 1, "--auto needs a CUDA GPU"),
        (["--", "--grpc-port=1"], 1, "--grpc-port is set by turbodiffusion-server"),
        (["serve", "surplus"], 2, "options of tritonserver come after"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], status: int, message: str) -> None:
    with launched(*arguments) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == status
    assert stdout == ""
    assert message in " ".join(stderr.replace("│", " ").split())
