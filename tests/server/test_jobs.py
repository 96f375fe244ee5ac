"""Durable jobs on a real Triton server with the tiny model: by gRPC, HTTP and command line, and over its death."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import insist
from processes import find_processes

from turbo_backend.server.process import TritonServer
from turbo_backend.settings import list_variables
from turbo_client import (
    AlreadyExistsError,
    AsyncClient,
    CancelledError,
    Client,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    UnimplementedError,
    Video,
)

pytestmark = pytest.mark.server

UNSET = {variable.name: "" for variable in list_variables()}
#: Steps and chunks long enough that a test can act between them.
LONG = {"prompt": "A red fox runs through snow", "seed": 5, "num_steps": 4, "num_frames": 33}
SHORT = {"prompt": "A red fox runs through snow", "seed": 5, "num_steps": 1, "num_frames": 5}


def environment(store: Path, **more: str) -> dict[str, str]:
    return {**UNSET, "TURBO_DEVICE": "cpu", "TURBO_JOB_STORE": str(store), **more}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs") / "store"


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_path = tmp_path_factory.mktemp("jobs") / "server.log"
    with TritonServer(
        environment=environment(store, TURBO_JOB_ATTEMPTS="100"),
        log_path=log_path,
        ready_timeout=120,
        restarts=20,
        restart_grace=0.5,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=200) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(client: Client) -> Callable[..., bytes]:
    """The video of a request that is no job, made once."""
    made: dict[str, Video] = {}

    def get(**request: object) -> bytes:
        key = json.dumps(request, sort_keys=True)
        if key not in made:
            made[key] = client.generate(**request)
        data = made[key].data
        assert data is not None
        return data

    return get


def test_a_job_is_submitted_watched_fetched_listed_and_deleted(
    client: Client, undisturbed: Callable[..., bytes]
) -> None:
    job = client.jobs.submit(**SHORT, request_id="whole", preview=True, priority_level=2)
    assert (job.job_id, job.seed, job.priority_level) == ("whole", 5, 2)
    told = list(client.jobs.watch("whole"))
    assert [(item.stage, item.step, item.num_steps) for item in told] == [
        ("denoiser", 1, 1),
        ("vae_decoder", 1, 2),
        ("vae_decoder", 2, 2),
        ("done", 2, 2),
    ]
    assert (told[0].preview or b"").startswith(b"\xff\xd8")
    assert list(client.jobs.watch("whole")) != [], "once more, from the beginning"
    video = client.jobs.result("whole")
    assert video.data == undisturbed(**SHORT)
    assert video.request_id == "whole"
    assert video.report["stages"]["denoiser"]["milliseconds"] > 0
    done = client.jobs.status("whole")
    assert (done.state, done.video_bytes) == ("done", len(video.data or b""))
    assert "whole" in [job.job_id for job in client.jobs.list()]
    assert client.jobs.delete("whole").state == "done"
    with pytest.raises(NotFoundError, match="no such job"):
        client.jobs.status("whole")


def test_the_same_id_joins_and_another_request_under_it_is_refused(client: Client, server: TritonServer) -> None:
    with ThreadPoolExecutor(20) as pool:
        jobs = list(
            pool.map(lambda _: client.jobs.submit("a ball", num_steps=1, num_frames=5, request_id="twin"), range(20))
        )
    assert len({(job.seed, job.submitted_at) for job in jobs}) == 1
    with pytest.raises(AlreadyExistsError, match="other parameters"):
        client.jobs.submit("a cube", num_steps=1, num_frames=5, request_id="twin")
    assert client.jobs.result("twin").seed == jobs[0].seed
    assert client.jobs.submit("a ball", num_steps=1, num_frames=5, request_id="twin").state == "done"


def test_bad_calls_are_refused_by_name(client: Client) -> None:
    with pytest.raises(InvalidArgumentError, match="NUM_FRAMES = 6: must be"):
        client.jobs.submit("a", num_frames=6)
    with pytest.raises(InvalidArgumentError, match="JOB_ID = 'no good': must be"):
        client.jobs.submit("a", request_id="no good")
    with pytest.raises(InvalidArgumentError, match="MODEL = 'image_to_video'"):
        client.jobs.submit("a", model="image_to_video")
    for method in (client.jobs.status, client.jobs.result, client.jobs.cancel, client.jobs.resume, client.jobs.delete):
        with pytest.raises(NotFoundError, match="no such job"):
            method("nobody")


def test_what_only_a_stage_can_see_fails_the_job_in_its_class(client: Client) -> None:
    client.jobs.submit("word " * 2000, request_id="too-long")
    with pytest.raises(InvalidArgumentError, match="at most 512 tokens"):
        client.jobs.result("too-long")
    assert client.jobs.status("too-long").error_code == "INVALID_ARG"


def test_a_running_job_is_cancelled_within_a_step_and_goes_on_when_asked(
    client: Client, undisturbed: Callable[..., bytes]
) -> None:
    client.jobs.submit(**LONG, request_id="given-up")
    at = next(client.jobs.watch("given-up")).step
    client.jobs.cancel("given-up")
    with pytest.raises(CancelledError):
        client.jobs.result("given-up")
    assert client.jobs.status("given-up").step <= at + 2, "the step that ran, and the one told just before"
    client.jobs.resume("given-up")
    video = client.jobs.result("given-up")
    assert video.data == undisturbed(**LONG)
    assert video.report["stages"]["denoiser"]["resumed_after"] >= 1


def test_a_request_that_is_no_job_is_cancelled_by_its_id(client: Client) -> None:
    with client.stream(**LONG, request_id="plain one") as stream:
        next(stream)
        client.cancel("plain one")
        with pytest.raises(CancelledError):
            stream.result()


@pytest.mark.parametrize("victim", ["denoiser", "vae_decoder", "jobs", "tritonserver"])
def test_a_job_survives_a_killed_process_to_the_same_bytes(
    server: TritonServer, client: Client, store: Path, undisturbed: Callable[..., bytes], victim: str
) -> None:
    expected = undisturbed(**LONG)
    job_id = f"survives-{victim}"
    client.jobs.submit(**LONG, request_id=job_id)
    stage = "vae_decoder" if victim == "vae_decoder" else "denoiser"
    seen, killed = set(), False
    for progress in client.jobs.watch(job_id):
        seen.add(progress.stage)
        if not killed and progress.stage == stage and progress.step > 1:
            os.kill(find_processes(server.pid)[victim], signal.SIGKILL)
            killed = True
    assert killed
    assert seen >= {"denoiser", "done"}
    assert client.jobs.result(job_id).data == expected
    assert client.jobs.status(job_id).resumes == 1
    assert list(store.rglob("*.part")) == []


def test_a_process_that_hangs_does_not_keep_the_store_from_the_next_server(
    server: TritonServer, client: Client, undisturbed: Callable[..., bytes]
) -> None:
    processes = find_processes(server.pid)
    os.kill(processes["jobs"], signal.SIGSTOP)
    os.kill(processes["supervisor"], signal.SIGKILL)
    insist(lambda: client.jobs.submit(**SHORT, request_id="after-a-hang"))
    assert client.jobs.result("after-a-hang").data == undisturbed(**SHORT)
    assert not Path(f"/proc/{processes['jobs']}").exists()


def test_a_stop_does_not_wait_for_jobs_and_the_next_start_goes_on(
    tmp_path: Path, undisturbed: Callable[..., bytes]
) -> None:
    expected = undisturbed(**LONG)
    log = tmp_path / "server.log"
    with TritonServer(environment=environment(tmp_path / "store"), log_path=log, exit_timeout=120) as first:
        with Client(first.grpc_url) as client:
            for number in range(4):
                client.jobs.submit(**LONG, request_id=f"job-{number}")
            next(client.jobs.watch("job-0"))
        assert first.stop() == 0
    states = {
        path.parent.name: json.loads(path.read_text().rpartition("\nsha256")[0])["state"]
        for path in (tmp_path / "store").rglob("progress")
    }
    assert "queued" in states.values()
    with (
        TritonServer(environment=environment(tmp_path / "store"), log_path=log) as second,
        Client(second.grpc_url) as client,
    ):
        for number in range(4):
            assert client.jobs.result(f"job-{number}").data == expected


def test_a_store_in_s3_keeps_jobs_over_the_death_of_the_denoiser(
    bucket: str, tmp_path: Path, undisturbed: Callable[..., bytes]
) -> None:
    expected = undisturbed(**LONG)
    with (
        TritonServer(
            environment={**environment(tmp_path), "TURBO_JOB_STORE": f"{bucket}/server"},
            log_path=tmp_path / "log",
            restarts=2,
            restart_grace=0.5,
        ) as server,
        Client(server.grpc_url, timeout=200) as client,
    ):
        client.jobs.submit(**LONG, request_id="far-away")
        killed = False
        for progress in client.jobs.watch("far-away"):
            if not killed and (progress.stage, progress.step) == ("denoiser", 2):
                os.kill(find_processes(server.pid)["denoiser"], signal.SIGKILL)
                killed = True
        video = client.jobs.result("far-away")
        assert killed
        assert video.data == expected
        assert video.report["stages"]["denoiser"]["resumed_after"] >= 1


def test_one_server_holds_a_store_and_another_says_so(store: Path, server: TritonServer, tmp_path: Path) -> None:
    with (
        TritonServer(environment=environment(store), log_path=tmp_path / "server.log") as other,
        Client(other.grpc_url) as client,
    ):
        with pytest.raises(UnavailableError, match="in use by another server"):
            client.jobs.list()
        assert client.generate(**SHORT).data, "videos are made all the same"


@pytest.mark.parametrize("kind", ["none", "a file in the way"])
def test_a_server_without_a_store_makes_videos_all_the_same(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    value = "none" if kind == "none" else str(tmp_path / "file" / "store")
    error = UnimplementedError if kind == "none" else UnavailableError
    with (
        TritonServer(
            environment={**environment(tmp_path), "TURBO_JOB_STORE": value}, log_path=tmp_path / "log"
        ) as server,
        Client(server.grpc_url) as client,
    ):
        with pytest.raises(error, match="keeps no jobs" if kind == "none" else "does not work"):
            client.jobs.list()
        assert client.generate(**SHORT).data


async def test_the_asyncio_client_does_the_same(server: TritonServer, undisturbed: Callable[..., bytes]) -> None:
    expected = undisturbed(**SHORT)
    async with AsyncClient(server.grpc_url) as client:
        job = await client.jobs.submit(**SHORT, request_id="asynchronous")
        told = [progress.stage async for progress in client.jobs.watch(job.job_id)]
        assert told[-1] == "done"
        assert (await client.jobs.result(job.job_id)).data == expected
        assert job.job_id in [found.job_id for found in await client.jobs.list()]
        assert (await client.jobs.cancel(job.job_id)).state == "done"
        assert (await client.jobs.delete(job.job_id)).state == "done"


def test_plain_http_is_enough(server: TritonServer, client: Client, undisturbed: Callable[..., bytes]) -> None:
    def call(outputs: list[dict[str, object]], **inputs: object) -> tuple[dict[str, object], bytes]:
        kinds = {"SEED": "INT64", "NUM_STEPS": "INT32", "NUM_FRAMES": "INT32"}
        tensors = [
            {"name": name, "shape": [1, 1], "datatype": kinds.get(name, "BYTES"), "data": [value]}
            for name, value in inputs.items()
        ]
        body = json.dumps({"inputs": tensors, "outputs": outputs}).encode()
        with urllib.request.urlopen(f"{server.http_url}/v2/models/jobs/infer", body) as response:  # noqa: S310
            content = response.read()
            length = int(response.headers.get("Inference-Header-Content-Length", len(content)))
        return json.loads(content[:length]), content[length:]

    state = [{"name": "STATE"}]
    answer, _ = call(
        state, OPERATION="submit", JOB_ID="by-http", PROMPT=SHORT["prompt"], SEED=5, NUM_STEPS=1, NUM_FRAMES=5
    )
    assert answer["outputs"][0]["data"] == ["queued"]
    client.jobs.result("by-http")
    _, video = call([{"name": "VIDEO", "parameters": {"binary_data": True}}], OPERATION="result", JOB_ID="by-http")
    assert struct.unpack("<I", video[:4])[0] == len(video) - 4
    assert video[4:] == undisturbed(**SHORT)


def test_the_command_line_submits_waits_and_writes(
    server: TritonServer, tmp_path: Path, undisturbed: Callable[..., bytes]
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "turbo_client", "jobs", *arguments, "--url", server.grpc_url]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    options = ("--seed", "5", "--num-steps", "1", "--num-frames", "5", "--request-id", "by-hand")
    assert run("submit", SHORT["prompt"], *options).stdout == "by-hand\n"
    assert run("watch", "by-hand").stdout == "by-hand\n"
    result = run("result", "by-hand")
    assert (result.returncode, result.stdout) == (0, "by-hand.mp4\n"), result.stderr
    assert (tmp_path / "by-hand.mp4").read_bytes() == undisturbed(**SHORT)
    assert "by-hand" in run("list").stdout
    assert json.loads(run("status", "by-hand", "--json").stdout)["state"] == "done"
    assert run("delete", "by-hand").returncode == 0
    gone = run("status", "by-hand")
    assert gone.returncode == 1
    assert "no such job" in gone.stderr


def test_metrics_count_jobs(server: TritonServer, client: Client) -> None:
    client.jobs.submit(**SHORT, request_id="counted")
    client.jobs.result("counted")
    with urllib.request.urlopen(server.metrics_url) as response:  # noqa: S310
        lines = response.read().decode().splitlines()
    names = {line.partition(" ")[0] for line in lines}
    assert names >= {'turbo_jobs{state="done"}', 'turbo_jobs{state="running"}', "turbo_job_store_bytes"}
