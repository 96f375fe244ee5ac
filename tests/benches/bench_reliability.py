"""Do jobs survive, do requests leave nothing behind? The real server with the tiny model on the CPU, four loads.

faults: processes of the server die at drawn moments under a load of mixed jobs; then every job must be done, with the
bytes of an undisturbed run, and nothing else left. soak: many requests, some cut off, cancelled or bad; memory of each
process at the end over that after the first part. crowd: many callers at once; nothing but the configured refusals.
cancel: how long a running job takes to end. The last stdout line is one JSON object; exit status 1 where a target is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from turbo_backend.manifest import versions
from turbo_backend.server.process import TritonServer
from turbo_backend.server.supervisor import child_states
from turbo_client import (
    CancelledError,
    Client,
    InvalidArgumentError,
    ResourceExhaustedError,
    RetryPolicy,
    TurboDiffusionError,
)

#: Small, unlike one another, and few enough to know each one's undisturbed video.
SHAPES = tuple(
    {"prompt": prompt, "seed": seed, "num_steps": num_steps, "num_frames": num_frames, "aspect_ratio": ratio}
    for seed, (prompt, num_steps, num_frames, ratio) in enumerate(
        (
            ("A red ball", 1, 5, "16:9"),
            ("A red ball", 4, 5, "16:9"),
            ("一只蓝色的猫", 2, 9, "1:1"),
            ("A green box rolls", 3, 5, "9:16"),
            ("A yellow star", 4, 9, "16:9"),
            ("A white cloud", 2, 5, "4:3"),
        ),
        start=1,
    )
)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


class Bench:
    """One server on a store of its own, as a context manager."""

    def __init__(self, **options: object) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-reliability-")
        self.store = Path(self._folder.name) / "jobs"
        environment = {
            "TURBO_DEVICE": "cpu",
            "TURBO_JOB_STORE": str(self.store),
            "TURBO_JOB_ATTEMPTS": "1000",
            "TURBO_JOB_CONCURRENCY": "4",
        }
        self.log = Path(self._folder.name) / "server.log"
        self.server = TritonServer(environment=environment, log_path=self.log, exit_timeout=30.0, **options)
        self.starts = 0

    def __enter__(self) -> Bench:
        self.server.start(self._count_start)
        retries = RetryPolicy(max_attempts=60, initial_delay=0.25, max_delay=1.0)
        self.client = Client(self.server.grpc_url, timeout=300, retries=retries)
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.server.stop()
        self._folder.cleanup()

    def _count_start(self) -> None:
        self.starts += 1

    def processes(self) -> dict[str, int]:
        """Process ids by model, and of the server itself; empty while it is started anew."""
        pid = self.server.pid
        if pid is None:
            return {}
        found = {"tritonserver": pid}
        for child in child_states(pid):
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if len(words) > 1 and words[1].endswith("model.py"):
                found[Path(words[1]).parent.parent.name] = child
        return found

    def leftovers(self) -> list[str]:
        """What a stopped server must not leave: processes, shared memory, temporary files, steps."""
        name = self.server.shm_prefix.rstrip("_")
        found = [str(path) for path in SHARED_MEMORY.glob(f"{name}*")]
        found += [str(path) for path in Path(tempfile.gettempdir()).glob(f"{name}*")]
        found += [str(path) for path in self.store.rglob("*.part")]
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if name in command:
                found.append(command.replace("\0", " "))
        return found


def measure_faults(kills: int, seed: int) -> dict[str, object]:
    """Kills drawn processes at drawn moments, with jobs always at hand."""
    draw = random.Random(seed)
    killed: Counter[str] = Counter()
    jobs: dict[str, int] = {}
    with Bench(restarts=kills + 1, restart_grace=0.5) as bench:
        expected = [bench.client.generate(**shape).data for shape in SHAPES]
        started = time.perf_counter()
        for _ in range(kills):
            states = Counter(job.state for job in bench.client.jobs.list())
            for _ in range(max(0, 5 - states["queued"] - states["running"])):
                index, job_id = draw.randrange(len(SHAPES)), f"fault-{len(jobs)}"
                bench.client.jobs.submit(**SHAPES[index], request_id=job_id, priority_level=draw.randrange(10))
                jobs[job_id] = index
            time.sleep(draw.uniform(0.0, 1.5))
            starts, victim = bench.starts, draw.choice(sorted(bench.processes()))
            killed[victim] += 1
            os.kill(bench.processes()[victim], signal.SIGKILL)
            while bench.starts == starts:
                if bench.server.poll() is not None:
                    raise RuntimeError(f"the server is gone: {bench.log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.05)
        lost, different = [], []
        for job_id, index in jobs.items():
            try:
                if bench.client.jobs.result(job_id).data != expected[index]:
                    different.append(job_id)
            except TurboDiffusionError as error:
                lost.append(f"{job_id}: {error}")
        kept = {job.job_id for job in bench.client.jobs.list()}
        resumes = sum(job.resumes for job in bench.client.jobs.list())
        seconds = time.perf_counter() - started
        bench.client.close()
        bench.server.stop()
        left = bench.leftovers()
    lost += sorted(jobs.keys() - kept)
    print(f"faults: {kills} kills {dict(killed)}, {len(jobs)} jobs, {resumes} resumes, {seconds:.0f} s")
    print(f"  lost {lost}\n  different {different}\n  left behind {left}")
    return {
        "kills": kills,
        "seed": seed,
        "killed": dict(killed),
        "jobs": len(jobs),
        "resumes": resumes,
        "lost": len(lost),
        "different": len(different),
        "left_behind": len(left),
        "seconds": round(seconds, 1),
        "met": not (lost or different or left),
    }


def measure_soak(requests: int, first: int, seed: int) -> dict[str, object]:
    """Requests of every kind, eight at a time; resident memory of each process after the first ones and at the end."""
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    kinds = draw.choices(("whole", "cut off", "cancelled", "bad", "job"), (60, 10, 10, 10, 10), k=requests)

    def one(client: Client, number: int) -> str:
        shape, kind = SHAPES[number % len(SHAPES)], kinds[number]
        if kind == "bad":
            try:
                client.generate(**{**shape, "num_frames": 6})
            except InvalidArgumentError:
                return "refused"
        elif kind == "job":
            job = client.jobs.submit(**shape)
            client.jobs.result(job.job_id)
            client.jobs.delete(job.job_id)
        elif kind == "whole":
            client.generate(**shape)
        else:
            with client.stream(**shape, request_id=f"soak-{number}") as stream:
                next(stream)
                if kind == "cancelled":
                    client.cancel(f"soak-{number}")
                    try:
                        stream.result()
                    except CancelledError:
                        return kind
                    return "cancelled too late"
        return kind

    def run(client: Client, numbers: range) -> None:
        with ThreadPoolExecutor(8) as pool:
            outcomes.update(pool.map(lambda number: one(client, number), numbers))

    with Bench() as bench:
        run(bench.client, range(first))
        before = _resident(bench)
        run(bench.client, range(first, requests))
        time.sleep(1.0)
        after = _resident(bench)
    growth = {name: round(100 * (after[name] / before[name] - 1), 1) for name in before}
    print(f"soak: {dict(outcomes)}\n  resident MB after {first} requests: {before}")
    print(f"  after {requests}: {after}\n  growth %: {growth}")
    return {
        "requests": requests,
        "outcomes": dict(outcomes),
        "resident_mb_first": before,
        "resident_mb_end": after,
        "growth_percent": growth,
        "met": max(growth.values()) <= 5.0,
    }


def measure_crowd(callers: int, seconds: float) -> dict[str, object]:
    """Callers that each ask again as soon as they are answered."""
    outcomes: Counter[str] = Counter()
    with Bench() as bench:
        ends = time.monotonic() + seconds

        def call(number: int) -> None:
            while time.monotonic() < ends:
                try:
                    bench.client.generate(**SHAPES[number % 2])
                    outcomes["videos"] += 1
                except ResourceExhaustedError:
                    outcomes["refused"] += 1
                    time.sleep(0.1)
                except TurboDiffusionError as error:
                    outcomes[f"{type(error).__name__}: {error}"] += 1

        threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(f"crowd: {callers} callers for {seconds:.0f} s: {dict(outcomes)}")
    return {"callers": callers, "outcomes": dict(outcomes), "met": set(outcomes) <= {"videos", "refused"}}


def measure_cancel(jobs: int, seed: int) -> dict[str, object]:
    """Milliseconds from the cancel's answer to the job's end, beside those of a step, and the steps told in between."""
    draw = random.Random(seed)
    waits, steps, late = [], [], 0
    with Bench() as bench:
        jobs_of = bench.client.jobs
        shape = {**SHAPES[4], "num_frames": 33}
        report = bench.client.generate(**shape).report
        step_ms = statistics.median(report["stages"]["denoiser"]["step_milliseconds"])
        for number in range(jobs):
            job_id, at = f"cancel-{number}", draw.choice((1, 2, 3))
            jobs_of.submit(**shape, request_id=job_id)
            while jobs_of.status(job_id).step < at:
                time.sleep(0.01)
            before = jobs_of.cancel(job_id)
            began = time.perf_counter()
            while not (job := jobs_of.status(job_id)).has_ended:
                time.sleep(0.005)
            waits.append((time.perf_counter() - began) * 1000)
            steps.append(job.step - before.step if job.stage == before.stage else 9)
            late += job.state != "cancelled"
    waits.sort()
    p99 = waits[max(0, round(0.99 * len(waits)) - 1)]
    p50 = statistics.median(waits)
    print(f"cancel: p50 {p50:.0f} ms, p99 {p99:.0f} ms, a step {step_ms:.0f} ms; steps told after it {steps}")
    return {
        "jobs": jobs,
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "step_ms": step_ms,
        "most_steps_after": max(steps),
        "not_cancelled": late,
        "met": max(steps) <= 1 and late == 0,
    }


def _resident(bench: Bench) -> dict[str, float]:
    """MB of each process."""
    found = {}
    for name, pid in bench.processes().items():
        (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
        found[name] = round(int(line.split()[1]) / 1024, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("faults", "soak", "crowd", "cancel"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--crowd-seconds", type=float, default=20.0)
    parser.add_argument("--cancels", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    measures = {
        "faults": lambda: measure_faults(arguments.kills, arguments.seed),
        "soak": lambda: measure_soak(arguments.requests, min(100, arguments.requests // 2), arguments.seed),
        "crowd": lambda: measure_crowd(64, arguments.crowd_seconds),
        "cancel": lambda: measure_cancel(arguments.cancels, arguments.seed),
    }
    chosen = [arguments.only] if arguments.only else list(measures)
    results = {name: measures[name]() for name in chosen}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    met = all(result["met"] for result in results.values())
    print(
        json.dumps(
            {
                "bench": "reliability",
                **results,
                "met": met,
                "processors": os.cpu_count(),
                "versions": versions(),
                "commit": commit,
            }
        )
    )
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
