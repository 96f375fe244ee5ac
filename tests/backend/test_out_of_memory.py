"""A request that runs out of memory is answered so, and harms nothing after it; estimates lie above the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from turbo_backend.errors import ResourceExhausted, TurboError
from turbo_backend.memory import as_turbo_error

SCRIPT = Path(__file__).with_name("out_of_memory.py")


def run(mode: str) -> dict[str, Any]:
    """The JSON of a fresh process: neither limits nor high-water marks may touch the other tests."""
    finished = subprocess.run([sys.executable, str(SCRIPT), mode], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    outcome: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return outcome


def test_a_request_that_runs_out_of_memory_is_answered_so_and_the_next_one_is_as_before() -> None:
    outcome = run("exhaust")
    for stage, message in outcome["messages"].items():
        assert message.startswith(f"ResourceExhausted: [RESOURCE_EXHAUSTED] {stage} ran out of memory"), message
    assert outcome["same"] == {"denoiser": True, "vae_decoder": True}


def test_estimates_are_no_less_than_what_is_used() -> None:
    for what, (estimate, grown) in run("measure")["bytes"].items():
        assert grown > 1 << 20, f"{what}: nothing was measured"
        assert grown <= estimate, what


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        ResourceExhausted("denoising needs 3 GiB, 1 GiB are free"),
    ],
    ids=["python", "pytorch", "c++", "onednn", "ours"],
)
def test_out_of_memory_is_known_by_any_name(error: Exception) -> None:
    told = as_turbo_error(error, "denoiser")
    assert isinstance(told, ResourceExhausted)
    assert str(told).startswith("[RESOURCE_EXHAUSTED] ")


def test_out_of_memory_is_known_behind_another_error() -> None:
    failed = TurboError("MP4 encoding failed")
    failed.__cause__ = MemoryError()
    assert isinstance(as_turbo_error(failed, "video encoder"), ResourceExhausted)


def test_other_errors_keep_their_class(caplog: pytest.LogCaptureFixture) -> None:
    assert type(as_turbo_error(RuntimeError("shape mismatch"), "denoiser")) is TurboError
    assert "shape mismatch" in caplog.text
    ours = TurboError("as it is")
    assert as_turbo_error(ours, "denoiser") is ours
