"""`turbodiffusion-server doctor`: what it finds here, and how it judges what is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from turbo_backend.errors import Misconfigured
from turbo_backend.server import doctor
from turbo_backend.server.backend_directory import check_installation, find_libpython
from turbo_backend.server.binary import PYTHON_VERSION, STUB_NAME, find_triton, inspect_installation

COMMAND = str(Path(sys.executable).with_name("turbodiffusion-server"))


def run_doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TURBO_", "TRITON"))}
    return subprocess.run(
        [COMMAND, "doctor", *arguments], capture_output=True, text=True, check=False, env={**environment, **variables}
    )


@pytest.mark.server
def test_this_machine_can_serve() -> None:
    finished = run_doctor("--json", TURBO_DEVICE="cpu", TURBO_MODLE="tiny")
    report = json.loads(finished.stdout)
    assert finished.returncode == 0, report
    assert report["ok"] is True
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["numpy"]["detail"] == numpy.__version__
    assert found["torch"]["detail"].startswith(torch.__version__)
    assert "tiny-T2V" in found["weights"]["detail"]
    assert f"with torch {torch.__version__}" in found["tritonserver starts"]["detail"]
    assert found["provider reference"]["detail"] == "available; would be used (the default on a CPU)"
    assert found["kernels"]["detail"] == "reference on cpu: every op agrees with the fp32 reference"
    remarks = [finding["detail"] for finding in report["findings"] if finding["state"] == "warning"]
    assert any("did you mean TURBO_MODEL?" in remark for remark in remarks)
    assert report["would_use"]["attention_provider"] == "reference"
    assert report["would_use"]["dtype"] == "float32"
    assert report["would_use"]["triton_version"].startswith("2.")


def test_what_cannot_serve_exits_with_one(tmp_path: Path) -> None:
    finished = run_doctor(
        TURBO_MODEL="Wan2.1-1.3B", TURBO_CHECKPOINT_DIR=str(tmp_path), TURBO_DEVICE="cpu", TRITONSERVER="/nowhere"
    )
    assert finished.returncode == 1
    failed = [line.split()[1] for line in finished.stdout.splitlines() if line.startswith("failed")]
    assert failed == ["weights", "tritonserver"]
    assert "TurboWan2.1-T2V-1.3B-480P.pth" in finished.stdout
    assert "TRITONSERVER: /nowhere is not an executable file" in finished.stdout


def test_a_provider_that_cannot_run_here_is_said_so() -> None:
    finished = run_doctor(TURBO_ATTENTION_PROVIDER="triton", TURBO_DEVICE="cpu", TRITONSERVER="/nowhere")
    assert finished.returncode == 1
    failed = [line.split()[1] for line in finished.stdout.splitlines() if line.startswith("failed")]
    assert failed == ["provider", "kernels", "tritonserver"]
    assert "would be used (TURBO_ATTENTION_PROVIDER says so)" in finished.stdout


@pytest.mark.parametrize(
    ("version", "cuda", "cudnn", "state"),
    [
        ("2.8.0+cu128", "12.8", 91002, "ok"),
        ("2.9.0+cu128", "12.8", 91500, "failed"),
        ("2.9.0+cpu", None, None, "failed"),
        ("2.9.1+cu128", "12.8", 91002, "failed"),
        ("2.9.1+cu128", "12.8", 91500, "ok"),
        ("2.13.0+cpu", None, None, "ok"),
        ("2.10.0a0+git1234", "13.0", 91400, "failed"),
    ],
)
def test_torch_is_judged_by_its_conv3d(version: str, cuda: str | None, cudnn: int | None, state: str) -> None:
    finding = doctor.judge_torch(version, cuda, cudnn)
    assert finding.state == state
    assert finding.detail.startswith(version)


@pytest.mark.parametrize(("free", "state"), [(4 << 30, "ok"), (64 << 20, "warning"), (16 << 20, "failed")])
def test_shared_memory_is_judged_by_what_is_free(free: int, state: str) -> None:
    assert doctor.judge_shared_memory(free).state == state


def test_the_wheel_serves_without_being_imported() -> None:
    installation = find_triton(environ={"PATH": ""})
    assert installation.from_wheel
    assert installation.origin == "nvidia-pytriton wheel"
    assert installation.stub.parent.name == PYTHON_VERSION
    assert "pytriton" not in sys.modules
    check_installation(installation)
    assert find_libpython().exists()


def make_installation(root: Path, *, python: str | None) -> Path:
    """The layout of the official container, with a stub that is linked against `python`."""
    (root / "bin").mkdir()
    (root / "lib").mkdir()
    (root / "backends" / "python").mkdir(parents=True)
    binary = root / "bin" / "tritonserver"
    binary.touch(mode=0o755)
    (root / "backends" / "python" / "libtriton_python.so").touch()
    if python is not None:
        (root / "backends" / "python" / STUB_NAME).write_bytes(b"\x7fELF\0" + python.encode() + b"\0")
    return binary


def test_the_server_named_first_wins(tmp_path: Path) -> None:
    binary = make_installation(tmp_path, python=f"libpython{PYTHON_VERSION}.so.1.0")
    found = find_triton(environ={"TRITONSERVER": str(binary), "PATH": ""})
    assert (found.binary, found.origin) == (binary, "environment variable TRITONSERVER")
    assert (found.from_wheel, found.libraries) == (False, (tmp_path / "lib",))
    check_installation(found)
    assert find_triton(environ={"PATH": str(binary.parent)}).origin == "PATH"
    assert find_triton(binary, environ={"TRITONSERVER": "/nowhere"}).origin == "--tritonserver"


def test_another_python_is_refused(tmp_path: Path) -> None:
    installation = inspect_installation(make_installation(tmp_path, python="libpython3.4.so.1.0"), "PATH")
    with pytest.raises(Misconfigured, match=rf"under Python 3\.4, and this is Python {PYTHON_VERSION}"):
        check_installation(installation)


@pytest.mark.parametrize(("python", "message"), [(None, "no Python backend stub"), ("libc.so.6", "names no libpython")])
def test_an_unusable_server_is_refused(tmp_path: Path, python: str | None, message: str) -> None:
    with pytest.raises(Misconfigured, match=message):
        inspect_installation(make_installation(tmp_path, python=python), "PATH")


def test_a_server_without_python_backend_is_refused(tmp_path: Path) -> None:
    binary = make_installation(tmp_path, python=None)
    (tmp_path / "backends" / "python" / "libtriton_python.so").unlink()
    with pytest.raises(Misconfigured, match="has no Python backend"):
        inspect_installation(binary, "PATH")
