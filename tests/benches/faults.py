"""Kills processes of a server that has jobs to run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from job_server import JobServer
from loads import SHAPES, make_videos

from turbo_client import InternalError, TurboDiffusionError, UnavailableError, UnreachableError

_Answer = TypeVar("_Answer")


@dataclass(slots=True)
class Faults:
    """What became of the jobs of a server whose processes were killed.

    Attributes:
        killed: how often, by process.
        in_starts: how many of the kills came while the server was coming back from the one before.
        jobs: submitted.
        resumes: times that a job went on.
        lost: jobs without a video.
        different: jobs whose video is not the undisturbed one.
        left_behind: processes and files.
    """

    killed: Counter[str] = field(default_factory=Counter)
    in_starts: int = 0
    jobs: int = 0
    resumes: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)


def kill_under_load(under_load: JobServer, kills: int, seed: int) -> Faults:
    """Kills drawn processes at drawn moments, with five jobs at hand, waits for the jobs, and stops the server.

    One kill in four comes while the server is coming back from the one before, as far as the draw of its moment goes.
    """
    draw = random.Random(seed)
    faults = Faults()
    client, jobs = under_load.client, {}
    videos = make_videos(client, SHAPES)
    for number in range(kills):
        if number and draw.random() < 0.25:
            faults.in_starts += 1
            time.sleep(draw.uniform(0.5, 3.0))
        else:
            under_load.wait_whole()
            states = Counter(job.state for job in insist(client.jobs.list))
            for _ in range(5 - states["queued"] - states["running"]):
                index, job_id = draw.randrange(len(SHAPES)), f"fault-{len(jobs)}"
                request = {**SHAPES[index], "request_id": job_id, "priority_level": draw.randrange(10)}
                insist(lambda request=request: client.jobs.submit(**request))
                jobs[job_id] = videos[index]
            time.sleep(draw.uniform(0.0, 1.5))
        faults.killed[_kill_one(under_load, draw)] += 1
    for job_id, video in jobs.items():
        try:
            if client.jobs.result(job_id).data != video:
                faults.different.append(job_id)
        except TurboDiffusionError as error:
            faults.lost.append(f"{job_id}: {error}")
    kept = {job.job_id: job for job in insist(client.jobs.list)}
    faults.lost += sorted(jobs.keys() - kept.keys())
    faults.jobs, faults.resumes = len(jobs), sum(job.resumes for job in kept.values())
    under_load.stop()
    faults.left_behind = under_load.leftovers()
    return faults


def insist(call: Callable[[], _Answer]) -> _Answer:
    """Asks until a server answers: one that has just lost a process cannot, and a new one may wait for the store."""
    while True:
        try:
            return call()
        except (InternalError, UnavailableError, UnreachableError):
            time.sleep(0.1)


def _kill_one(under_load: JobServer, draw: random.Random) -> str:
    while True:
        processes = under_load.processes
        if processes:
            name = draw.choice(sorted(processes))
            try:
                os.kill(processes[name], signal.SIGKILL)
            except ProcessLookupError:  # it has just ended
                continue
            return name
        time.sleep(0.02)
