"""Jobs on disk: kept, found again, and never worse off than a file that rots."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from turbo_backend.errors import TurboError
from turbo_backend.jobs.names import check_job_id, finished_steps, request_name, step_name
from turbo_backend.jobs.records import (
    Corrupt,
    Job,
    JobProgress,
    JobRequest,
    JobState,
    seal,
    unseal,
)
from turbo_backend.jobs.retention import choose_expired
from turbo_backend.jobs.steps import StepFiles
from turbo_backend.jobs.storage import Folder, Storage
from turbo_backend.jobs.store import JobStore

Ask = Callable[..., JobRequest]


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_records_survive_their_files(ask: Ask) -> None:
    for record in (ask("one", "狐狸", SEED=7), JobProgress(state=JobState.DONE, video_bytes=3)):
        assert unseal(type(record), seal(record)) == record


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:-9], lambda c: c.replace(b"red", b"bad"), lambda c: b"", lambda c: c * 2]
)
def test_a_record_that_rots_is_noticed(ask: Ask, spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(Corrupt, match="checksum"):
        unseal(JobRequest, spoil(seal(ask("one"))))


@pytest.mark.parametrize("job_id", ["", ".", "..", "a/b", "a b", "a.b", "-a", "x" * 65, "ä", None, 3])
def test_ids_that_name_no_file_are_refused(job_id: object) -> None:
    with pytest.raises(TurboError, match="JOB_ID"):
        check_job_id(job_id)


def test_jobs_are_found_again_in_their_order(storage: Storage, ask: Ask) -> None:
    store = JobStore(storage)
    for job_id in ("b", "a", "c"):
        store.add(ask(job_id), None)
    store.change("a", state=JobState.FAILED, error_code="INTERNAL", error="why")
    store.finish("c", b"an mp4", '{"seed": 1}')
    again = JobStore(storage)
    assert [job.job_id for job in again.all()] == ["b", "a", "c"]
    assert again.all() == store.all()
    done = again.get("c")
    assert done is not None
    assert again.result(done) == (b"an mp4", '{"seed": 1}')
    assert again.add(ask("d"), None).request.sequence == 4
    assert again.start == store.start + 1


def test_an_image_is_kept_with_its_job_and_checked(storage: Storage, ask: Ask) -> None:
    request = dataclasses.replace(ask("one"), image_sha256=hashlib.sha256(b"jpeg").hexdigest())
    store = JobStore(storage)
    job = store.add(request, b"jpeg")
    assert store.image(job) == b"jpeg"
    storage.write("jobs/one/image", b"jpe")
    with pytest.raises(Corrupt, match="image"):
        store.image(job)


def test_a_submission_cut_short_leaves_no_job(storage: Storage) -> None:
    storage.write("jobs/half/image", b"jpeg")
    assert JobStore(storage).all() == []
    assert storage.sizes("jobs") == {}


def test_a_spoiled_progress_file_means_once_more_and_a_spoiled_request_file_is_told(storage: Storage, ask: Ask) -> None:
    store = JobStore(storage)
    store.add(ask("one"), None)
    store.finish("one", b"mp4", "{}")
    store.add(ask("two"), None)
    storage.write("jobs/one/progress", (storage.read("jobs/one/progress") or b"")[:-20])
    storage.write(request_name("two"), b"{}")
    again = JobStore(storage)
    one, two = again.get("one"), again.get("two")
    assert one is not None
    assert two is not None
    assert one.state is JobState.QUEUED
    assert two.state is JobState.FAILED
    assert "request file cannot be read" in two.progress.error
    again.remove("two")
    assert [job.job_id for job in JobStore(storage).all()] == ["one"]


def test_a_spoiled_video_is_noticed(storage: Storage, ask: Ask) -> None:
    store = JobStore(storage)
    store.add(ask("one"), None)
    job = store.finish("one", b"an mp4", "{}")
    storage.write("jobs/one/video.mp4", b"an mq4")
    with pytest.raises(Corrupt, match="damaged"):
        store.result(job)


def test_a_write_that_fails_changes_nothing(tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Folder(tmp_path)
    store = JobStore(storage)
    store.add(ask("one"), None)

    def fail(name: str, content: bytes) -> None:
        raise TurboError("full")

    monkeypatch.setattr(storage, "write", fail)
    with pytest.raises(TurboError, match="full"):
        store.change("one", state=JobState.RUNNING)
    with pytest.raises(TurboError, match="full"):
        store.add(ask("two"), None)
    assert [(job.job_id, job.state) for job in store.all()] == [("one", JobState.QUEUED)]


def test_bytes_are_counted_and_what_no_job_owns_is_removed(storage: Storage, ask: Ask) -> None:
    store = JobStore(storage)
    job = store.add(ask("one"), None)
    StepFiles(storage, {}).save(job.request.request_id, 1, torch.zeros(2, 2, dtype=torch.float64))
    storage.write("steps/gone.0123456789abcdef/1", b"orphan")
    store.tidy()
    assert "steps/gone.0123456789abcdef/1" not in storage.sizes()
    assert store.num_bytes == sum(storage.sizes("jobs").values()) + sum(storage.sizes("steps").values())
    store.finish("one", b"x" * 1000, "{}")
    assert storage.sizes("steps") == {}
    store.tidy()
    assert store.num_bytes == sum(storage.sizes("jobs").values())


def test_ages_follow_neither_a_clock_that_is_set_nor_a_night_without_a_server(storage: Storage, ask: Ask) -> None:
    monotonic, clock = Clock(), Clock()
    store = JobStore(storage, monotonic=monotonic, clock=clock)
    store.add(ask("one"), None)
    monotonic.now += 100
    clock.now -= 1e6
    job = store.finish("one", b"mp4", "{}")
    assert job.progress.ended_age == pytest.approx(100)
    clock.now += 1e9
    store.tidy()
    monotonic.now = 5
    again = JobStore(storage, monotonic=monotonic, clock=clock)
    monotonic.now += 50
    assert again.age == pytest.approx(150)


def aged(ask: Ask, job_id: str, state: JobState, sequence: int, ended_age: float | None) -> Job:
    return Job(dataclasses.replace(ask(job_id), sequence=sequence), JobProgress(state=state, ended_age=ended_age))


def test_retention_takes_the_longest_finished_and_never_an_unfinished_job(ask: Ask) -> None:
    jobs = [
        aged(ask, "running", JobState.RUNNING, 1, None),
        aged(ask, "old", JobState.DONE, 2, 10.0),
        aged(ask, "failed", JobState.FAILED, 3, 40.0),
        aged(ask, "interrupted", JobState.INTERRUPTED, 4, None),
        aged(ask, "new", JobState.DONE, 5, 90.0),
    ]
    sizes = dict.fromkeys((job.job_id for job in jobs), 10)

    def expired(max_age: float, max_bytes: int) -> list[str]:
        return choose_expired(jobs, sizes, age=100.0, max_age=max_age, max_bytes=max_bytes)

    assert expired(1000.0, 1000) == []
    assert expired(80.0, 1000) == ["old"]
    assert expired(1000.0, 35) == ["old", "failed"]
    assert expired(0.0, 0) == ["old", "failed", "new"]


def test_steps_are_found_again_newest_first_and_two_are_kept(storage: Storage, ask: Ask) -> None:
    request_id = JobStore(storage).add(ask("one"), None).request.request_id
    files = StepFiles(storage, {"weights": ["a"]})
    states = [torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(3)]
    assert files.load(request_id) is None
    for step, state in enumerate(states, start=1):
        files.save(request_id, step, state)
    assert finished_steps(storage, request_id) == [2, 3]
    found = StepFiles(storage, {"weights": ["a"]}).load(request_id)
    assert found is not None
    assert found[0] == 3
    assert torch.equal(found[1], states[2])
    assert found[1].dtype == torch.float64
    assert StepFiles(storage, {"weights": ["b"]}).load(request_id) is None, "made with other weights"


@pytest.mark.parametrize(
    "spoil",
    [lambda c: c[: len(c) // 2], lambda c: c[:-1] + b"\x01", lambda c: b"", lambda c: b"TDSTEP1\n", lambda c: b"x" + c],
)
def test_a_torn_step_costs_one_step(storage: Storage, ask: Ask, spoil: Callable[[bytes], bytes]) -> None:
    request_id = JobStore(storage).add(ask("one"), None).request.request_id
    files = StepFiles(storage, {})
    for step in (1, 2):
        files.save(request_id, step, torch.full((2, 2), float(step), dtype=torch.float64))
    storage.write(step_name(request_id, 2), spoil(storage.read(step_name(request_id, 2)) or b""))
    found = files.load(request_id)
    assert found is not None
    assert found[0] == 1
    assert torch.equal(found[1], torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("request_id", ["plain", "../../etc.0123456789abcdef", "one.0123456789abcdef", ""])
def test_a_request_that_is_no_jobs_keeps_nothing(storage: Storage, ask: Ask, request_id: str) -> None:
    JobStore(storage).add(ask("one"), None)
    files = StepFiles(storage, {})
    with pytest.raises(TurboError, match="no job runs under request id"):
        files.save(request_id, 1, torch.zeros(1, dtype=torch.float64))
    with pytest.raises(TurboError, match="no job runs under request id"):
        files.load(request_id)
    assert storage.sizes("steps") == {}
