"""The `turbodiffusion` command against the real server, as a person at a terminal uses it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from turbo_backend.server.process import TritonServer

pytestmark = pytest.mark.server
COMMAND = [sys.executable, "-m", "turbo_client"]
SHORT = ["--num-steps", "1", "--num-frames", "17"]


def run(*arguments: str, url: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments, "--url", url]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_generate_info_and_replay_give_the_same_file(triton: TritonServer, tmp_path: Path) -> None:
    made = run(
        "generate", "一只 red fox", "-o", "fox.mp4", "--fps", "12", "--json", *SHORT, url=triton.grpc_url, cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    answer = json.loads(made.stdout)
    assert answer["seed"] > 0
    manifest = subprocess.run(
        [*COMMAND, "info", "fox.mp4", "--json"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert json.loads(manifest.stdout)["prompt"] == "一只 red fox"
    again = run("replay", "fox.mp4", "-o", "again.mp4", url=triton.grpc_url, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "differ" not in again.stderr
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "fox.mp4").read_bytes()


def test_previews_and_raw_frames_are_saved(triton: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    made = run("generate", "a", "-o", "a.npy", "--preview-dir", "previews", *SHORT, url=triton.grpc_url, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert np.load(tmp_path / "a.npy").shape == (17, 144, 256, 3)
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["step_1_of_1.jpg"]


def test_refused_value_is_a_usage_error_in_one_line(triton: TritonServer, tmp_path: Path) -> None:
    made = run("generate", "a", "-o", "a.mp4", "--num-frames", "16", url=triton.grpc_url, cwd=tmp_path)
    assert made.returncode == 2
    assert "NUM_FRAMES" in made.stderr
    assert "Traceback" not in made.stderr
    assert not list(tmp_path.iterdir())


def test_status_names_the_models(triton: TritonServer, tmp_path: Path) -> None:
    shown = run("status", "--json", url=triton.grpc_url, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert {"denoiser", "text_encoder", "text_to_video", "vae_decoder"} <= {
        model["name"] for model in json.loads(shown.stdout)["models"]
    }


def test_cancelling_what_has_ended_says_so(triton: TritonServer, tmp_path: Path) -> None:
    def jobs(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run("jobs", *arguments, url=triton.grpc_url, cwd=tmp_path)

    assert jobs("submit", "a", "--request-id", "ended", *SHORT).returncode == 0
    assert jobs("watch", "ended").returncode == 0
    for operation in ("cancel", "resume"):
        answer = jobs(operation, "ended")
        assert (answer.returncode, answer.stdout) == (0, "ended\n")
        assert answer.stderr == f"warning: ended is done already, there is nothing to {operation}\n"
    assert jobs("delete", "ended").returncode == 0
    nobody = run("cancel", "nobody", url=triton.grpc_url, cwd=tmp_path)
    assert nobody.returncode == 0
    assert "if there is one" in nobody.stderr


def test_interrupt_leaves_no_file(triton: TritonServer, tmp_path: Path) -> None:
    command = [*COMMAND, "generate", "a long one", "-o", "a.mp4", "--num-frames", "65", "--url", triton.grpc_url]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        # As in a terminal: a shell's background job ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    process.stderr.readline()  # it has begun to report progress
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())
