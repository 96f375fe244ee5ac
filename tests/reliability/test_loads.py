"""Many callers of the real server at once: what they get, what they leave, and how long they wait, in steps."""

from __future__ import annotations

import pytest
from job_server import PROCESSES, JobServer
from loads import SHAPES, MixedLoad, cancel_jobs, cut_streams, send_drafts
from processes import resident_mb

pytestmark = [pytest.mark.server, pytest.mark.reliability]


@pytest.mark.timeout(1200)
def test_sixty_four_callers_for_two_minutes_get_what_they_ask_for_and_leave_nothing(under_load: JobServer) -> None:
    load = MixedLoad(under_load.client, SHAPES, callers=64, seed=7)
    load.fill_batches()
    load.run(requests=100)
    load.settle()
    first = resident_mb(under_load.processes)
    load.run(requests=500)
    load.settle()
    end = resident_mb(under_load.processes)
    load.run(requests=500, seconds=120.0)
    assert load.faults == {}
    assert set(load.outcomes) >= {"whole", "cut off", "cancelled", "bad", "job"}
    assert set(first) == set(end) == PROCESSES
    assert sum(end.values()) <= 1.05 * sum(first.values()), f"MB after 100 requests {first}, after 500 {end}"


def test_a_cancelled_job_tells_at_most_one_step_more(under_load: JobServer) -> None:
    cancels = cancel_jobs(under_load.client, jobs=20, seed=7)
    assert cancels.not_cancelled == []
    assert max(cancels.further_steps) <= 1


def test_a_stream_that_is_cut_while_its_video_is_decoded_ends_with_the_running_chunk(under_load: JobServer) -> None:
    cuts = cut_streams(under_load.client, under_load.server.metrics_url, streams=8, seed=7)
    assert cuts.not_cancelled == 0
    assert max(cuts.further_chunks) <= 1


def test_a_draft_waits_for_at_most_two_steps_of_finals(under_load: JobServer) -> None:
    drafts = send_drafts(under_load.client, drafts=20, finals=4)
    assert max(drafts.turns_waited) <= 2
    assert min(drafts.turns_waited) >= 1, "there were finals all the time"
