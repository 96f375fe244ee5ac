"""Processes of the real server die at any moment; no job is lost for it, nor any byte of its video."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import kill_under_load
from job_server import JobServer

pytestmark = [pytest.mark.server, pytest.mark.reliability]

KILLS = 50


@pytest.mark.timeout(1200)
def test_jobs_survive_fifty_kills_to_the_same_bytes(tmp_path: Path) -> None:
    with JobServer(tmp_path, restarts=KILLS + 1) as under_load:
        faults = kill_under_load(under_load, KILLS, seed=7)
    assert sum(faults.killed.values()) == KILLS
    assert faults.resumes > 0, "the kills met jobs at work"
    assert faults.lost == []
    assert faults.different == []
    assert faults.left_behind == []
