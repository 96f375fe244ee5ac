"""Settings of the whole suite."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import turbo_backend  # noqa: F401  # before torch: it sets how OpenMP threads wait

sys.path.insert(0, str(Path(__file__).parent / "benches"))  # what tests and benches share

# The suite never judges by the clock: a busy machine must not fail it.
settings.register_profile("no-clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-clock")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Closes the run with one JSON line, after pytest's own."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        outcomes = ("passed", "failed", "error", "skipped", "xfailed", "deselected")
        counts = {outcome: len(reporter.stats.get(outcome, [])) for outcome in outcomes}
        print(json.dumps({"tests": counts, "met": counts["failed"] == counts["error"] == 0 < counts["passed"]}))


@pytest.fixture(scope="session", autouse=True)
def no_store_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that are told no job store take their user's: for the whole run, an empty one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URL of a bucket of an S3 server in this process."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "of no use elsewhere")
        s3fs.S3FileSystem().mkdir("jobs")
        yield "s3://jobs"
    server.stop()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws is the same in every run, whichever tests ran before."""
    import torch  # not above: turbo_backend comes first

    torch.manual_seed(0)
