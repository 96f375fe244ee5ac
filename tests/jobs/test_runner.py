"""Jobs run, wait, fail, are cancelled, resumed and forgotten; `generate` stands for the ensemble, as in the server."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from turbo_backend.errors import (
    AlreadyExists,
    InvalidArgument,
    Misconfigured,
    NotFound,
    ResourceExhausted,
    TurboError,
    Unavailable,
)
from turbo_backend.jobs.names import step_name
from turbo_backend.jobs.outcome import MAX_FAILURES, MAX_OWN_FAILURES, AttemptFailed, Verdict, judge
from turbo_backend.jobs.queue import OVERTAKING, JobQueue
from turbo_backend.jobs.records import Job, JobRequest, JobState
from turbo_backend.jobs.runner import JobRunner, Limits, Update
from turbo_backend.jobs.service import Call, JobService
from turbo_backend.jobs.storage import Folder, Storage
from turbo_backend.jobs.store import JobStore

from .conftest import MODELS_SERVED

Ask = Callable[..., JobRequest]
LIMITS = Limits(concurrency=2, max_attempts=2, resume=True, max_age=1e9, max_bytes=10**9)


class Ensemble:
    """Runs jobs in two steps, each of which a test can hold; ends them when they are cancelled."""

    def __init__(self) -> None:
        self.cancelled: set[str] = set()
        self.runs: Counter[str] = Counter()
        self.order: list[str] = []
        self.failures: dict[str, list[AttemptFailed]] = {}
        self.hold = threading.Event()
        self.hold.set()
        self.started = threading.Semaphore(0)
        self.changed = threading.Event()

    def request(self, key: str) -> None:
        self.cancelled.add(key)
        self.hold.set()

    def forget(self, *keys: str) -> None:
        self.cancelled.difference_update(keys)

    def generate(self, request: JobRequest, image: bytes | None) -> Iterator[Update]:
        self.runs[request.job_id] += 1
        self.order.append(request.job_id)
        self.started.release()
        if self.failures.get(request.job_id):
            raise self.failures[request.job_id].pop(0)
        for step in (1, 2):
            yield Update(stage="denoiser", step=step, step_count=2)
            assert self.hold.wait(60)
            if request.request_id in self.cancelled:
                raise AttemptFailed("CANCELLED", "the request was cancelled")
        yield Update(stage="done", step=2, step_count=2, video=video_of(request), report="{}")


def video_of(request: JobRequest) -> bytes:
    return f"{request.values['PROMPT']} {request.seed}".encode()


@pytest.fixture
def ensemble() -> Ensemble:
    return Ensemble()


@pytest.fixture
def counted() -> Counter[str]:
    return Counter()


@pytest.fixture
def start(storage: Storage, ensemble: Ensemble, counted: Counter[str]) -> Iterator[Callable[..., JobRunner]]:
    """`start(concurrency=1)` starts a runner on the storage, in place of one before."""
    runners: list[JobRunner] = []

    def make(**limits: object) -> JobRunner:
        store = JobStore(storage)
        count = lambda what, model: counted.update([what])  # noqa: E731
        runner = JobRunner(store, ensemble.generate, ensemble, dataclasses.replace(LIMITS, **limits), count)
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.stop()
        ensemble.hold.set()
        runner.join()


def wait(runner: JobRunner, job_id: str, *states: JobState) -> Job:
    """The job, once it is in one of these states."""
    ticks = threading.Event()
    for _ in range(3000):
        if runner.get(job_id).state in states:
            return runner.get(job_id)
        ticks.wait(0.01)
    raise AssertionError(f"{job_id} is {runner.get(job_id).state}, not {states}")


def test_a_job_runs_and_its_video_is_kept(start: Callable[..., JobRunner], ask: Ask) -> None:
    runner = start()
    request = ask("one", SEED=3)
    assert runner.submit(request, None).state is JobState.QUEUED
    job = wait(runner, "one", JobState.DONE)
    assert runner.result("one") == (job, video_of(request), "{}")
    assert [(event.stage, event.step) for event in runner.watching.since("one", 0)] == [
        ("denoiser", 1),
        ("denoiser", 2),
        ("done", 2),
    ]
    assert runner.counts()[JobState.DONE] == 1


def test_a_cursor_gives_each_event_once_over_a_restart_too(
    start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble
) -> None:
    first = start()
    first.submit(ask("one"), None)
    wait(first, "one", JobState.DONE)
    cursor = first.watching.since("one", 0)[-1].number
    assert first.watching.since("one", cursor) == []
    first.stop()
    first.join()
    second = start()
    second.submit(ask("two"), None)
    wait(second, "two", JobState.DONE)
    assert len(second.watching.since("two", cursor)) == 3


def test_twenty_threads_with_one_id_make_one_job(start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble) -> None:
    runner = start()
    with ThreadPoolExecutor(20) as pool:
        # Each of them draws a seed of its own where 0 asks for one.
        jobs = list(pool.map(lambda _: runner.submit(ask("one"), None), range(20)))
    assert len({job.request.seed for job in jobs}) == 1
    wait(runner, "one", JobState.DONE)
    assert ensemble.runs == {"one": 1}
    assert runner.submit(ask("one"), None).state is JobState.DONE


@pytest.mark.parametrize("other", [{"SEED": 4}, {"prompt": "a blue fox"}, {"NUM_STEPS": 2}])
def test_the_same_id_with_other_parameters_is_refused(
    start: Callable[..., JobRunner], ask: Ask, other: dict[str, object]
) -> None:
    runner = start()
    runner.submit(ask("one", SEED=3), None)
    with pytest.raises(AlreadyExists, match="other parameters"):
        runner.submit(ask("one", **{"SEED": 3, **other}), None)
    runner.submit(ask("one", priority_level=0, SEED=3), None)


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_at_its_next_step(
    start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble, counted: Counter[str]
) -> None:
    runner = start(concurrency=1)
    ensemble.hold.clear()
    runner.submit(ask("running"), None)
    assert ensemble.started.acquire(timeout=60)
    runner.submit(ask("queued"), None)
    assert runner.cancel("queued").state is JobState.CANCELLED
    runner.cancel("running")
    assert wait(runner, "running", JobState.CANCELLED).progress.ended_at is not None
    assert ensemble.runs == {"running": 1}
    assert counted == {"cancel": 2}
    assert runner.cancel("queued").state is JobState.CANCELLED, "twice is once"


def test_a_cancelled_job_can_go_on(start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble) -> None:
    runner = start(concurrency=1)
    ensemble.hold.clear()
    request = runner.submit(ask("one"), None).request
    assert ensemble.started.acquire(timeout=60)
    runner.cancel("one")
    wait(runner, "one", JobState.CANCELLED)
    with pytest.raises(NotFound):
        runner.resume("two")
    assert runner.resume("one").progress.resumes == 1
    wait(runner, "one", JobState.DONE)
    assert runner.result("one")[1] == video_of(request)


def test_unfinished_jobs_go_on_after_a_crash_with_the_same_seed(
    storage: Storage, start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble, counted: Counter[str]
) -> None:
    """What a killed process leaves: a job that runs, one that waits, and no word of farewell."""
    store = JobStore(storage)
    requests = [store.add(ask(job_id), None).request for job_id in ("running", "queued")]
    store.change("running", state=JobState.RUNNING, attempts=1)
    runner = start()
    for request in requests:
        wait(runner, request.job_id, JobState.DONE)
        assert runner.result(request.job_id)[1] == video_of(request)
    assert runner.get("running").progress.resumes == 1
    assert counted == {"resume": 1}


def test_without_the_option_they_wait_for_resume(storage: Storage, start: Callable[..., JobRunner], ask: Ask) -> None:
    store = JobStore(storage)
    store.add(ask("one"), None)
    store.change("one", state=JobState.RUNNING, attempts=1)
    runner = start(resume=False)
    assert runner.get("one").state is JobState.INTERRUPTED
    runner.resume("one")
    wait(runner, "one", JobState.DONE)


def test_a_job_that_takes_the_server_down_again_and_again_is_left_alone(
    storage: Storage, start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble
) -> None:
    store = JobStore(storage)
    request = store.add(ask("bad"), None).request
    store.add(ask("moving"), None)
    for job_id in ("bad", "moving"):
        store.change(job_id, state=JobState.RUNNING, attempts=LIMITS.max_attempts)
    storage.write(step_name(store.all()[1].request.request_id, 1), b"a step finished since")
    runner = start()
    wait(runner, "moving", JobState.DONE)
    assert runner.get("bad").state is JobState.INTERRUPTED
    assert ensemble.runs == {"moving": 1}
    runner.resume("bad")
    wait(runner, "bad", JobState.DONE)
    assert runner.result("bad")[1] == video_of(request)


def test_a_stop_leaves_jobs_to_the_next_start(
    start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble, counted: Counter[str]
) -> None:
    runner = start(concurrency=1)
    ensemble.hold.clear()
    for job_id in ("one", "two"):
        runner.submit(ask(job_id), None)
    assert ensemble.started.acquire(timeout=60)
    runner.stop()
    runner.join()
    assert ensemble.runs == {"one": 1}
    with pytest.raises(Unavailable, match="stopping"):
        runner.submit(ask("three"), None)
    again = start()
    for job_id in ("one", "two"):
        wait(again, job_id, JobState.DONE)
    assert counted == {}


def test_priorities_lead_and_nobody_waits_for_ever(ask: Ask) -> None:
    queue = JobQueue()
    queue.put(dataclasses.replace(ask("last", priority_level=9), sequence=1))
    queue.put(dataclasses.replace(ask("normal", priority_level=5), sequence=2))
    for number in range(9 * OVERTAKING + 5):
        queue.put(dataclasses.replace(ask(f"first-{number}", priority_level=0), sequence=3 + number))
    taken = [queue.take() for _ in range(len(queue))]
    assert taken[0] == "first-0"
    assert taken.index("normal") == pytest.approx(5 * OVERTAKING, abs=2)
    assert taken.index("last") == pytest.approx(9 * OVERTAKING, abs=3)


def test_pauses_grow_with_failures_and_end_with_them(ask: Ask) -> None:
    now = [0.0]
    queue, request = JobQueue(lambda: now[0]), ask("one")
    pauses = []
    for _ in range(9):
        queue.put_back(request)
        assert queue.take() is None
        pauses.append(queue.pause())
        now[0] += pauses[-1] or 0.0
        assert queue.take() == "one"
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert queue.failures("one") == 9
    queue.remove("one")
    assert queue.failures("one") == 0
    assert queue.pause() is None


@pytest.mark.parametrize(
    ("code", "message", "failures", "verdict"),
    [
        ("INVALID_ARG", "NUM_FRAMES = 6: must be ...", 0, Verdict.FAIL),
        ("CANCELLED", "the request was cancelled", 0, Verdict.CANCEL),
        ("UNAVAILABLE", "[RESOURCE_EXHAUSTED] 64 requests wait or run already, as many as ...", 500, Verdict.RETRY),
        ("UNAVAILABLE", "[RESOURCE_EXHAUSTED] vae_decoder ran out of memory", 0, Verdict.RETRY),
        ("UNAVAILABLE", "[RESOURCE_EXHAUSTED] vae_decoder ran out of memory", MAX_OWN_FAILURES - 1, Verdict.FAIL),
        ("INTERNAL", "denoiser failed: ValueError: x (request one.0)", MAX_OWN_FAILURES - 1, Verdict.FAIL),
        ("INTERNAL", "Stub process 'denoiser_0_0' is not healthy.", MAX_OWN_FAILURES, Verdict.RETRY),
        ("INTERNAL", "Server not ready", MAX_FAILURES - 1, Verdict.FAIL),
    ],
)
def test_what_a_failure_means(code: str, message: str, failures: int, verdict: Verdict) -> None:
    assert judge(AttemptFailed(code, message), failures=failures) is verdict


def test_a_passing_failure_is_tried_again_and_a_refusal_is_told(
    start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble
) -> None:
    ensemble.failures["one"] = [AttemptFailed("INTERNAL", "Server not ready")]
    ensemble.failures["two"] = [AttemptFailed("INVALID_ARG", "PROMPT = 'x': must be shorter")]
    runner = start()
    for job_id in ("one", "two"):
        runner.submit(ask(job_id), None)
    assert wait(runner, "one", JobState.DONE).progress.error == ""
    failed = wait(runner, "two", JobState.FAILED).progress
    assert (failed.error_code, failed.error) == ("INVALID_ARG", "PROMPT = 'x': must be shorter")
    assert ensemble.runs == {"one": 2, "two": 1}


def test_a_store_that_is_full_for_a_while_costs_a_job_nothing(
    storage: Storage, start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = start()
    write, refusals = storage.write, [ResourceExhausted("the job store is full")]

    def full_once(name: str, content: bytes) -> None:
        if name.endswith("video.mp4") and refusals:
            raise refusals.pop()
        write(name, content)

    monkeypatch.setattr(storage, "write", full_once)
    runner.submit(ask("one"), None)
    wait(runner, "one", JobState.DONE)
    assert ensemble.runs == {"one": 2}


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.ENOSPC, ResourceExhausted, "is full: No space left"),
        (errno.EROFS, Misconfigured, "Read-only file system"),
    ],
)
def test_a_disk_that_takes_no_more_refuses_submissions_and_loses_no_job(
    tmp_path: Path, ask: Ask, ensemble: Ensemble, number: int, error: type[TurboError], words: str
) -> None:
    runner = JobRunner(JobStore(Folder(tmp_path)), ensemble.generate, ensemble, LIMITS, lambda what, model: None)
    ensemble.hold.clear()
    runner.submit(ask("running"), None)
    assert ensemble.started.acquire(timeout=60)

    refused = threading.Semaphore(0)

    def refuse(source: object, target: object) -> None:
        refused.release()
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(error, match=words):
            runner.submit(ask("late"), None)
        assert refused.acquire(timeout=60)
        ensemble.hold.set()
        assert refused.acquire(timeout=60), "its video cannot be kept"
        assert runner.get("running").state is not JobState.DONE
        with pytest.raises(NotFound):
            runner.get("late")
    wait(runner, "running", JobState.DONE)
    runner.submit(ask("late"), None)
    wait(runner, "late", JobState.DONE)
    runner.stop()
    runner.join()
    kept = JobStore(Folder(tmp_path))
    assert [(job.job_id, job.state) for job in kept.all()] == [("running", JobState.DONE), ("late", JobState.DONE)]
    assert list(tmp_path.rglob("*.part")) == []


def test_a_full_store_forgets_the_finished_and_then_refuses(
    start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble
) -> None:
    runner = start(concurrency=1, max_bytes=1500)
    runner.submit(ask("old"), None)
    wait(runner, "old", JobState.DONE)
    ensemble.hold.clear()
    assert ensemble.started.acquire(timeout=60)
    runner.submit(ask("new"), b"x" * 1000)
    with pytest.raises(NotFound):
        runner.get("old")
    with pytest.raises(ResourceExhausted, match="unfinished jobs"):
        runner.submit(ask("more"), b"x" * 1500)


def test_a_spoiled_video_is_made_again(storage: Storage, start: Callable[..., JobRunner], ask: Ask) -> None:
    runner = start()
    request = runner.submit(ask("one"), None).request
    wait(runner, "one", JobState.DONE)
    storage.write("jobs/one/video.mp4", b"rotten")
    with pytest.raises(Unavailable, match="made again"):
        runner.result("one")
    wait(runner, "one", JobState.DONE)
    assert runner.result("one")[1] == video_of(request)


def test_only_what_has_ended_is_deleted(start: Callable[..., JobRunner], ask: Ask, ensemble: Ensemble) -> None:
    runner = start(concurrency=1)
    ensemble.hold.clear()
    runner.submit(ask("one"), None)
    assert ensemble.started.acquire(timeout=60)
    with pytest.raises(Unavailable, match="cancel it first"):
        runner.delete("one")
    ensemble.hold.set()
    wait(runner, "one", JobState.DONE)
    assert runner.delete("one").job_id == "one"
    with pytest.raises(NotFound):
        runner.get("one")
    runner.submit(ask("one", SEED=9), None)


def test_pages_of_jobs(start: Callable[..., JobRunner], ask: Ask) -> None:
    runner = start()
    for number in range(7):
        runner.submit(ask(f"job-{number}"), None)
    first = runner.list(0, 4)
    rest = runner.list(first[-1].request.sequence, 4)
    assert [job.job_id for job in (*first, *rest)] == [f"job-{number}" for number in range(7)]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"operation": "frob"}, "OPERATION = 'frob': must be one of submit, status"),
        ({"operation": "status"}, "JOB_ID = None"),
        ({"operation": "cancel", "job_id": "../x"}, "JOB_ID = '../x'"),
        ({"operation": "submit", "prompt": " "}, "PROMPT"),
        ({"operation": "submit", "prompt": "a", "values": {"NUM_FRAMES": 6}}, "NUM_FRAMES = 6"),
        ({"operation": "submit", "prompt": "a", "model": "image_to_video"}, "MODEL = 'image_to_video'"),
        ({"operation": "submit", "prompt": "a", "image": b"x"}, "MODEL = 'image_to_video'"),
        ({"operation": "submit", "prompt": "a", "parameters": {"container": "raw"}}, "container = 'raw'"),
        ({"operation": "submit", "prompt": "a", "parameters": {"deadline_ms": 5}}, "deadline_ms = 5"),
        ({"operation": "submit", "prompt": "a", "parameters": {"priority_level": 10}}, "priority_level = 10"),
    ],
)
def test_a_bad_call_is_refused_by_name(start: Callable[..., JobRunner], call: dict[str, object], told: str) -> None:
    runner = start()
    service = JobService(lambda: runner, MODELS_SERVED, lambda request_id: None)
    with pytest.raises(InvalidArgument) as caught:
        service.answer(Call(**call))
    assert told in str(caught.value)
    assert runner.list(0, 10) == []


def test_a_server_without_jobs_says_so_and_still_cancels_requests() -> None:
    cancelled: list[str] = []

    def no_runner() -> JobRunner:
        raise TurboError("the store is somebody else's")

    service = JobService(no_runner, MODELS_SERVED, cancelled.append)
    with pytest.raises(TurboError, match="somebody else's"):
        service.answer(Call(operation="list"))
    service.answer(Call(operation="cancel_request", job_id="any id at all"))
    assert cancelled == ["any id at all"]
