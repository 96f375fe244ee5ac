"""Loads on a server through its client: mixed requests, cancels, drafts among finals.

The tests judge what these return; `bench_reliability.py` prints it beside times.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from metrics import count

from turbo_client import (
    CancelledError,
    Client,
    InvalidArgumentError,
    JobStatus,
    ResourceExhaustedError,
    TurboDiffusionError,
)

Shape = Mapping[str, Any]

#: Small, unlike one another, and few enough to know each one's undisturbed video.
SHAPES: tuple[Shape, ...] = tuple(
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
#: Its steps are long enough that something can happen between two of them.
LONG: Shape = {"prompt": "A yellow star", "seed": 5, "num_steps": 4, "num_frames": 33}
_BAD: tuple[Shape, ...] = (
    {"num_frames": 6},
    {"num_steps": 5},
    {"prompt": ""},
    {"prompt": "word " * 2000},
    {"sigma_max": float("nan")},
)

#: Kinds of requests in a mixed load, of a hundred.
_KINDS = {"whole": 60, "cut off": 10, "cancelled": 10, "bad": 10, "job": 10}
_TOO_LATE = "done before its cancellation"
_FULL = "refused and sent again"
#: What may become of a request of a mixed load.
FORESEEN = frozenset({*_KINDS, _TOO_LATE, _FULL})


def make_videos(client: Client, shapes: Sequence[Shape]) -> list[bytes]:
    """The video of each, undisturbed."""
    videos = [client.generate(**shape).data for shape in shapes]
    return [video for video in videos if video is not None]


class MixedLoad:
    """Whole requests, some cut off, cancelled or bad, and jobs; a request's number decides what it is.

    Args:
        client: sends them.
        shapes: of the requests, in turn.
        callers: that each ask again as soon as they are answered.
        seed: of the draws.

    Attributes:
        outcomes: what became of the requests; anything that is not `FORESEEN` is a fault.
    """

    def __init__(self, client: Client, shapes: Sequence[Shape], *, callers: int, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._client = client
        self._shapes = shapes
        self._videos = make_videos(client, shapes)
        self._callers = callers
        self._seed = seed
        self._lock = threading.Lock()
        self._sent = 0

    def fill_batches(self) -> None:
        """Sends sixteen of each shape at once, so that the largest batches there can be have taken their memory."""
        for shape, expected in zip(self._shapes, self._videos, strict=True):
            with ThreadPoolExecutor(16) as pool:
                videos = pool.map(lambda shape: self._client.generate(**shape).data, [shape] * 16)
                self.outcomes.update("whole" if video == expected else "a video that differs" for video in videos)

    def settle(self) -> None:
        """Sends a few equal requests one by one, so that memory is compared at rest and after the same work."""
        for _ in range(3):
            self._client.generate(**self._shapes[0])

    def run(self, requests: int, seconds: float = 0.0) -> None:
        """Sends on until there were `requests` in all and `seconds` have passed; returns when none is left."""
        ends = time.monotonic() + seconds
        with ThreadPoolExecutor(self._callers) as pool:
            for caller in [pool.submit(self._call, requests, ends) for _ in range(self._callers)]:
                caller.result()

    @property
    def faults(self) -> dict[str, int]:
        """Outcomes that nothing allows."""
        return {outcome: number for outcome, number in self.outcomes.items() if outcome not in FORESEEN}

    def _call(self, requests: int, ends: float) -> None:
        while True:
            with self._lock:
                number = self._sent
                if number >= requests and time.monotonic() >= ends:
                    return
                self._sent += 1
            outcome = _FULL
            while outcome == _FULL:
                outcome = self._send(number)
                with self._lock:
                    self.outcomes[outcome] += 1
                if outcome == _FULL:
                    time.sleep(0.1)

    def _send(self, number: int) -> str:
        draw = random.Random(self._seed * 1_000_000 + number)
        (kind,) = draw.choices(list(_KINDS), list(_KINDS.values()))
        shape, expected = self._shapes[number % len(self._shapes)], self._videos[number % len(self._shapes)]
        try:
            if kind == "bad":
                bad = draw.choice(_BAD)
                self._client.generate(**{**shape, **bad})
                return f"taken in spite of {bad}"
            if kind == "job":
                return kind if self._run_job(shape) == expected else "a job's video that differs"
            if kind == "whole":
                return kind if self._client.generate(**shape).data == expected else "a video that differs"
            with self._client.stream(**shape, request_id=f"mixed-{number}") as stream:
                next(stream)
                if kind == "cancelled":
                    self._client.cancel(f"mixed-{number}")
                    stream.result()
                    return _TOO_LATE
        except ResourceExhaustedError as error:
            return _FULL if "wait or run already" in str(error) else str(error)
        except InvalidArgumentError as error:
            return kind if kind == "bad" else str(error)
        except CancelledError as error:
            return kind if kind == "cancelled" else str(error)
        except TurboDiffusionError as error:
            return f"{kind}: {type(error).__name__}: {error}"
        return kind

    def _run_job(self, shape: Shape) -> bytes | None:
        job = self._client.jobs.submit(**shape)
        video = self._client.jobs.result(job.job_id).data
        self._client.jobs.delete(job.job_id)
        return video


@dataclass(slots=True)
class Cancels:
    """Running jobs that were cancelled.

    Attributes:
        milliseconds: from the wish to cancel to the job's end, by the clock, of each.
        further_steps: steps (or decoded chunks) told after the answer to it, of each.
        not_cancelled: jobs that were done all the same.
        step_milliseconds: of undisturbed steps.
    """

    milliseconds: list[float] = field(default_factory=list)
    further_steps: list[int] = field(default_factory=list)
    not_cancelled: list[str] = field(default_factory=list)
    step_milliseconds: list[float] = field(default_factory=list)


def cancel_jobs(client: Client, jobs: int, seed: int) -> Cancels:
    """Cancels as many jobs, one by one, each after a drawn number of its steps; the server's clock must be this one."""
    draw = random.Random(seed)
    cancels = Cancels()
    for _ in range(5):
        cancels.step_milliseconds += client.generate(**LONG).report["stages"]["denoiser"]["step_milliseconds"]
    for _ in range(jobs):
        job_id, at = client.jobs.submit(**LONG).job_id, draw.choice((1, 2, 3))
        while client.jobs.status(job_id).step < at:
            time.sleep(0.01)
        began = time.time()
        before = client.jobs.cancel(job_id)
        while not (job := client.jobs.status(job_id)).has_ended:
            time.sleep(0.05)  # who asks all the time slows the step that is waited for
        assert job.ended_at is not None
        cancels.milliseconds.append((job.ended_at - began) * 1000)
        cancels.further_steps.append(_num_told(job) - _num_told(before))
        if job.state != "cancelled":
            cancels.not_cancelled.append(job_id)
        client.jobs.delete(job_id)
    return cancels


def _num_told(job: JobStatus) -> int:
    """Steps and chunks that a job of `LONG` has told by now."""
    return job.step if job.stage == "denoiser" else LONG["num_steps"] + job.step


@dataclass(slots=True)
class Cuts:
    """Streams that were cut while their video was decoded.

    Attributes:
        further_chunks: that were decoded after the cut, of each; the one that ran then is among them.
        not_cancelled: how many were decoded to their end.
        chunk_milliseconds: of an undisturbed video, each.
    """

    further_chunks: list[int] = field(default_factory=list)
    not_cancelled: int = 0
    chunk_milliseconds: float = 0.0


def cut_streams(client: Client, metrics_url: str, streams: int, seed: int) -> Cuts:
    """Cuts as many streams, one by one, each after a drawn chunk; nothing else may be decoded meanwhile."""

    def num_decoded() -> float:
        return count(metrics_url, "turbo_vae_decoder_chunks")

    def num_ended(outcome: str) -> float:
        return count(metrics_url, "turbo_vae_decoder_requests", f'"{outcome}"')

    draw = random.Random(seed)
    shape = {**LONG, "num_steps": 1, "num_frames": 129}
    num_chunks = 33
    cuts = Cuts()
    cuts.chunk_milliseconds = client.generate(**shape).report["stages"]["vae_decoder"]["milliseconds"] / num_chunks
    for _ in range(streams):
        chunks, at = num_decoded(), draw.randint(1, num_chunks // 2)
        cancelled, done = num_ended("cancelled"), num_ended("done")
        with client.stream(**shape) as stream:
            while (progress := next(stream)).stage != "vae_decoder" or progress.step < at:
                pass
        while num_ended("cancelled") == cancelled and num_ended("done") == done:
            time.sleep(0.05)
        cuts.not_cancelled += num_ended("done") > done
        cuts.further_chunks.append(int(num_decoded() - chunks) - at)
    return cuts


@dataclass(slots=True)
class Drafts:
    """Drafts among finals.

    Attributes:
        turns_waited: denoising turns of others between a draft's arrival and its last step, of each.
        milliseconds: that it waited, of each.
        final_step_milliseconds: the median step of the finals that were done meanwhile.
    """

    turns_waited: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    final_step_milliseconds: float | None = None


def send_drafts(client: Client, drafts: int, finals: int) -> Drafts:
    """Sends drafts of two steps, one after another, while as many callers ask for finals without a pause.

    The first caller takes its videos. The others give theirs up before the last step and ask for the next one, since
    where decoding takes longer the denoiser would be idle; their first ones each after another step, so that not all of
    them begin anew at once.
    """
    found = Drafts()
    steps: list[float] = []
    over = threading.Event()
    begun = threading.Barrier(finals + 1)

    def ask_for_finals(number: int) -> None:
        waits, last_step = True, number - 1
        while not over.is_set():
            with client.stream(**{**LONG, "seed": number, "num_frames": 17}) as stream:
                for progress in stream:
                    if waits:
                        begun.wait(60)
                        waits = False
                    if over.is_set():
                        return
                    if (progress.stage, progress.step) == ("denoiser", last_step):
                        break
                else:
                    steps.extend(stream.result().report["stages"]["denoiser"]["step_milliseconds"])
            last_step = LONG["num_steps"] - 1 if number > 1 else 0

    with ThreadPoolExecutor(finals) as pool:
        callers = [pool.submit(ask_for_finals, number) for number in range(1, finals + 1)]
        try:
            begun.wait(60)
            for number in range(1, drafts + 1):
                report = client.generate("A red ball", seed=number, num_steps=2, num_frames=5).report
                found.turns_waited.append(report["stages"]["denoiser"]["turns_waited"])
                found.milliseconds.append(report["stages"]["denoiser"]["queue_milliseconds"])
        finally:
            over.set()
        for caller in callers:
            caller.result()
    found.final_step_milliseconds = statistics.median(steps) if steps else None
    return found
