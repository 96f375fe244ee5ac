"""Storages to keep jobs in, and jobs to keep."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from turbo_backend.config import MODELS
from turbo_backend.jobs.records import JobRequest
from turbo_backend.jobs.service import Call, make_request
from turbo_backend.jobs.storage import Storage, open_storage

MODELS_SERVED = {"text_to_video": MODELS["tiny"]}


@pytest.fixture(params=["folder", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, and places behind fsspec."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{secrets.token_hex(8)}"
    return str(tmp_path / "jobs") if request.param == "folder" else f"memory://{secrets.token_hex(8)}/jobs"


@pytest.fixture
def storage(location: str) -> Storage:
    return open_storage(location)


@pytest.fixture
def ask() -> Callable[..., JobRequest]:
    """`ask("one", SEED=3)` is what the job `one` asks for."""

    def make(job_id: str, prompt: str = "a red fox", priority_level: int = 5, **values: object) -> JobRequest:
        call = Call(
            operation="submit",
            job_id=job_id,
            prompt=prompt,
            values=values,
            parameters={"priority_level": priority_level},
        )
        return make_request(MODELS_SERVED, call)

    return make
