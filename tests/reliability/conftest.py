"""One server with a job store, for the loads that break nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from job_server import JobServer


@pytest.fixture(scope="session")
def under_load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    with JobServer(tmp_path_factory.mktemp("under-load")) as under_load:
        yield under_load
        under_load.stop()
        assert under_load.leftovers() == []
