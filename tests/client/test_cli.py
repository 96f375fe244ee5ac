"""The command against a server on loopback.

Where signals, terminals or the process itself matter, it runs as a process of its own; elsewhere `main` runs in this
one, which saves a second of imports a test.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import resource
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    FRAMES,
    MANIFEST,
    PREVIEW,
    REPORT,
    FakeTriton,
    make_mp4,
    read_inputs,
    read_parameters,
    respond,
)

from turbo_client import __version__
from turbo_client._manifest import parse_manifest
from turbo_client.cli import main

COMMAND = [sys.executable, "-m", "turbo_client"]


@dataclass
class Result:
    returncode: int
    stdout: bytes
    stderr: bytes


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Runs the command in `tmp_path`, its input and environment set by keyword."""

    def call(*arguments: object, stdin: bytes = b"", **env: str) -> Result:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name in [name for name in os.environ if name.startswith("TURBO_")]:
                patch.delenv(name)
            for name, value in {"COLUMNS": "200", **env}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["turbodiffusion", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            before = signal.getsignal(signal.SIGTERM)
            try:
                with pytest.raises(SystemExit) as ended:
                    main()
            finally:
                signal.signal(signal.SIGTERM, before)
        out, err = capfdbinary.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return call


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TURBO_")}
    return kept | {"COLUMNS": "100", "TERM": "xterm-256color"} | changes


def start(*arguments: object, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=obey_interrupts,
    )


def obey_interrupts() -> None:
    """As in a terminal: the background job of a shell, as this run may be, ignores SIGINT, its children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_request(fake: FakeTriton) -> None:
    deadline = time.monotonic() + 30
    while not fake.requests and time.monotonic() < deadline:
        time.sleep(0.02)
    assert fake.requests


def test_generate(fake: FakeTriton, tmp_path: Path) -> None:
    process = start("generate", "a fox", "-o", "out.mp4", "--url", fake.address, "--num-steps", 2, folder=tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output == b"out.mp4\n"
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == fake.video
    lines = re.sub(r"\d+\.\d s", "T", errors.decode()).splitlines()
    lines = [line.removesuffix("  about T left") for line in lines]
    assert lines == [
        "denoiser 1/2  T",
        "denoiser 2/2  T",
        "decoder 1/2  T",
        "decoder 2/2  T",
        f"32×16 · 5 frames · 16 fps · {len(fake.video) / 1000:.0f} kB · seed 4242 · T",
        "text encoder 4 ms · denoiser 20 ms · decoder 9 ms · encoder 2 ms",
    ]
    assert read_inputs(fake.requests[0])["PROMPT"] == "a fox"
    assert read_parameters(fake.requests[0])["preview"] is False


def test_every_parameter_is_an_option(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    options = [
        "--seed", 7, "--num-steps", 1, "--num-frames", 33, "--resolution", "144p", "--aspect-ratio", "9:16",
        "--sigma-max", 80.5, "--attention-type", "original", "--sla-topk", 0.2, "--ode", "--fps", 24,
        "--priority-level", 3, "--request-id", "mine", "--model", "text_to_video_14b", "--api-key-header", "x-key",
        "--quiet",
    ]  # fmt: skip
    result = run("generate", "狐狸", *options, TURBO_URL=fake.address, TURBO_API_KEY="k1")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"out.mp4\n", b"")
    (request,) = fake.requests
    assert (request.id, request.model_name) == ("mine", "text_to_video_14b")
    assert read_inputs(request) == {
        "PROMPT": "狐狸",
        "SEED": 7,
        "NUM_STEPS": 1,
        "NUM_FRAMES": 33,
        "RESOLUTION": "144p",
        "ASPECT_RATIO": "9:16",
        "SIGMA_MAX": 80.5,
        "ATTENTION_TYPE": "original",
        "SLA_TOPK": 0.2,
        "ODE": True,
    }
    assert read_parameters(request) | {"fps": 24, "priority_level": 3} == read_parameters(request)
    assert fake.metadata[0]["x-key"] == "k1"


def test_prompt_from_stdin_and_previews(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    result = run("generate", "-", "--url", fake.address, "--preview-dir", "steps", stdin="雪中\n狐狸\n".encode())
    assert result.returncode == 0, result.stderr
    assert read_inputs(fake.requests[0])["PROMPT"] == "雪中\n狐狸"
    assert read_parameters(fake.requests[0])["preview"] is True
    assert sorted(os.listdir(tmp_path / "steps")) == [f"step_{step}_of_4.jpg" for step in (1, 2, 3, 4)]
    assert (tmp_path / "steps" / "step_1_of_4.jpg").read_bytes() == PREVIEW


@pytest.mark.parametrize("options", [["--container", "raw"], ["-o", "out.npy"]])
def test_raw_frames(run: Run, fake: FakeTriton, tmp_path: Path, options: list[str]) -> None:
    result = run("generate", "a", "--url", fake.address, *options)
    assert (result.returncode, result.stdout) == (0, b"out.npy\n")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), FRAMES)
    assert read_parameters(fake.requests[0])["container"] == "raw"


def test_json(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    result = run("generate", "a", "--url", fake.address, "--json", "--request-id", "r1")
    found = json.loads(result.stdout)
    assert result.stdout.count(b"\n") == 1
    assert found.pop("seconds") > 0
    assert found == {
        "path": "out.mp4",
        "container": "mp4",
        "request_id": "r1",
        "seed": 4242,
        "width": 32,
        "height": 16,
        "num_frames": 5,
        "fps": 16,
        "bytes": len(fake.video),
        "report": REPORT | {"request_id": "r1"},
    }
    assert b"denoiser 1/4" in result.stderr


def aborting(code: grpc.StatusCode, message: str) -> Any:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort(code, message)
        yield

    return answer


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.UNAUTHENTICATED, 1),
        (grpc.StatusCode.UNAVAILABLE, 1),
    ],
)
def test_server_errors(run: Run, fake: FakeTriton, tmp_path: Path, code: grpc.StatusCode, expected: int) -> None:
    fake.answer = aborting(code, "[bold] \x1b[31mtwo\nlines")
    result = run("generate", "a", "--url", fake.address, "--request-id", "r1", "--json")
    assert result.returncode == expected
    line = "error: [bold] \\x1b[31mtwo lines (request r1)\n"
    assert result.stderr.decode() == line
    error = json.loads(result.stdout)["error"]
    assert (error["status"], error["request_id"], error["exit_code"]) == (code.name, "r1", expected)
    assert os.listdir(tmp_path) == []


def test_unreachable(run: Run, nobody: str) -> None:
    for arguments in (("generate", "a"), ("status",)):
        result = run(*arguments, "--url", nobody)
        assert result.returncode == 3
        assert result.stderr.startswith(f"error: cannot reach {nobody}: ".encode())
        assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"])
def test_a_port_that_speaks_something_else_is_named(run: Run, answer: bytes) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1024)
            self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = run("status", "--url", f"127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert result.returncode == 3
    assert b"that port does not speak gRPC" in result.stderr


def test_unknown_model_says_where_to_look(run: Run, fake: FakeTriton) -> None:
    fake.answer = aborting(grpc.StatusCode.UNKNOWN, "Request for unknown model: 'nope' is not found")
    result = run("generate", "a", "--url", fake.address, "--model", "nope")
    assert result.returncode == 1
    assert result.stderr.endswith(b"; `turbodiffusion status` lists what the server has\n")


def test_a_file_that_cannot_be_written_is_named(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    """A limit on file sizes, set while the video is made, stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
        yield from fake.succeed(request, context)

    fake.answer = answer
    try:
        result = run("generate", "a", "--url", fake.address, "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.returncode == 1
    assert result.stderr == b"error: out.mp4 cannot be written: File too large\n"
    assert os.listdir(tmp_path) == []


def test_timeout(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    fake.answer = fake.hang
    result = run("generate", "a", "--url", fake.address, "--timeout", 0.5, "-q")
    assert result.returncode == 4
    assert re.fullmatch(rb"error: no video within 0\.5 s \(request \w+\)\n", result.stderr)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_cancels_and_leaves_no_file(
    fake: FakeTriton, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    fake.answer = fake.hang
    process = start("generate", "a", "--url", fake.address, folder=tmp_path)
    wait_for_request(fake)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"Traceback" not in errors
    assert os.listdir(tmp_path) == []
    assert fake.stream_ended.wait(10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "Missing argument"),
        (["generate", "a", "--seed", "x"], "--seed"),
        (["generate", "a", "--seed", 2**63], "does not fit into 64 bits"),
        (["generate", "a", "-o", "absent/out.mp4"], "folder absent does not exist"),
        (["generate", "a", "-o", "taken.mp4"], "--force replaces it"),
        (["generate", "a", "-o", "folder", "--force"], "not a regular file"),
        (["generate", "a", "-o", os.devnull, "--force"], "not a regular file"),
        (["generate", "a", "-o", "out.mp4", "--container", "raw"], "written as .npy"),
        (["generate", "a", "--preview-dir", "absent/steps"], "cannot make folder"),
        (["generate", "a", "--tls-ca", "absent.pem"], "absent.pem"),
        (["generate", "a", "--tls-ca", "taken.mp4"], "holds no PEM block"),
        (["generate", "a", "--tls-cert", "taken.mp4"], "both or neither"),
        (["generate", "a", "--url", "http://127.0.0.1:8000"], "must be HOST:PORT"),
        (["generate", os.fsdecode(b"\xff\xfe")], "not valid Unicode"),
        (["replay", "absent.mp4", "-o", "out.mp4"], "absent.mp4"),
        (["replay", "taken.mp4", "-o", "out.mp4"], "not an MP4 file"),
        (["info", "taken.mp4"], "not an MP4 file"),
        (["generate", "a", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_calls_exit_with_2(run: Run, fake: FakeTriton, tmp_path: Path, arguments: list[Any], says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.mp4").write_bytes(b"something else")
    result = run(*arguments, TURBO_URL=fake.address)
    assert result.returncode == 2, result.stderr.decode()
    assert says in " ".join(re.sub(r"[│╭╰─╮╯]", " ", result.stderr.decode()).split())
    assert b"Traceback" not in result.stderr
    assert result.stdout == b""
    assert sorted(os.listdir(tmp_path)) == ["folder", "taken.mp4"]
    assert (tmp_path / "taken.mp4").read_bytes() == b"something else"
    assert fake.requests == []


def test_stdin_that_is_not_utf8(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    result = run("generate", "-", "--url", fake.address, stdin=b"\xff")
    assert result.returncode == 2
    assert b"not UTF-8" in result.stderr


def test_force(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"older")
    assert run("generate", "a", "--url", fake.address, "--force").returncode == 0
    assert (tmp_path / "out.mp4").read_bytes() == fake.video


def test_a_file_that_appears_meanwhile_is_left_alone(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        (tmp_path / "out.mp4").write_bytes(b"newer")
        yield from fake.succeed(request, context)

    fake.answer = answer
    result = run("generate", "a", "--url", fake.address, "-q")
    assert result.returncode == 1
    assert b"was left alone" in result.stderr
    assert (tmp_path / "out.mp4").read_bytes() == b"newer"


def test_replay_and_info(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(fake.video)
    result = run("replay", "a.mp4", "-o", "b.mp4", "--url", fake.address, "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"b.mp4\n", b"")
    (request,) = fake.requests
    made = parse_manifest(json.dumps(MANIFEST)).request()
    assert read_inputs(request) == read_inputs(made.encode(model="text_to_video", request_id=""))
    assert request.model_name == "text_to_video"
    assert read_parameters(request)["fps"] == 24

    assert json.loads(run("info", "a.mp4", "--json").stdout) == MANIFEST
    shown = run("info", "a.mp4").stdout.decode()
    for expected in ("红色的狐狸 in the snow", "sla_topk", "0.25", "sha256:aa"):
        assert expected in shown


def test_replay_warns_of_what_differs(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    manifest = MANIFEST | {"weights": {"denoiser": "sha256:zz"}, "ensemble": "text_to_video_14b"}
    (tmp_path / "a.mp4").write_bytes(make_mp4(json.dumps(manifest)))
    result = run("replay", "a.mp4", "-o", "b.mp4", "--url", fake.address, "-q")
    assert result.returncode == 0
    assert result.stderr == b"warning: weights.denoiser: sha256:zz then, sha256:aa now\n"
    assert fake.requests[0].model_name == "text_to_video_14b"
    run("replay", "a.mp4", "-o", "c.mp4", "--url", fake.address, "--model", "other")
    assert fake.requests[1].model_name == "other"


def test_status(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    fake.models.append(("broken", "1", "UNAVAILABLE", "no \x1b weights"))
    result = run("status", "--url", fake.address)
    assert result.returncode == 0
    assert result.stdout.decode().splitlines()[0] == f"{fake.address}  triton 2.51.0  ready"
    assert re.search(r"✗ +broken +unavailable +no \\x1b weights", result.stdout.decode())
    fake.ready = False
    result = run("status", "--url", fake.address, "--json")
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert (found["live"], found["ready"], found["version"]) == (True, False, "2.51.0")
    assert [model["name"] for model in found["models"]] == ["broken", "denoiser", "text_to_video"]


def test_notes_of_the_server_are_shown(run: Run, fake: FakeTriton, tmp_path: Path) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield respond(request, "done", 1, 1, video=b"x", report=REPORT | {"notes": ["prompt cut to 512 tokens"]})

    fake.answer = answer
    result = run("generate", "a", "--url", fake.address)
    assert b"warning: prompt cut to 512 tokens\n" in result.stderr


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout.decode() == f"turbodiffusion {__version__}\n"
    shown = run("--help")
    assert shown.returncode == 0
    for name in ("generate", "replay", "info", "status"):
        assert name in shown.stdout.decode()


def test_progress_on_a_terminal_is_drawn_in_place(fake: FakeTriton, tmp_path: Path) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for response in fake.succeed(request, context):
            time.sleep(0.15)
            yield response

    fake.answer = answer
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "generate", "a", "--url", fake.address],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        screen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says EIO when the last writer is gone
                break
            if not piece:
                break
            screen += piece
        assert process.stdout is not None
        assert process.stdout.read() == b"out.mp4\n"
    os.close(ours)
    assert process.returncode == 0
    shown = screen.decode()
    for expected in ("waiting", "denoiser", "decoder", "3/4", "left", "seed 4242", "\x1b[?25h"):
        assert expected in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
