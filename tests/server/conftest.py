"""One real Triton server for all tests that only call it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from turbo_backend.server.process import TritonServer
from turbo_backend.settings import list_variables


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    """The committed model repository with the tiny model on the CPU, started once for the whole run.

    Whatever `TURBO_*` variables the caller's shell holds count as unset. Other settings: parametrize `triton`
    indirectly with a dict of variables, which starts a server of its own.
    """
    unset = {variable.name: "" for variable in list_variables()}
    environment = {**unset, "TURBO_DEVICE": "cpu", **getattr(request, "param", {})}
    log_path = tmp_path_factory.mktemp("triton") / "server.log"
    with TritonServer(environment=environment, log_path=log_path, ready_timeout=120) as server:
        yield server
