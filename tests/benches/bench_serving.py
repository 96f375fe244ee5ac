"""What serving costs and what batching brings, on the embedded tiny model and the real server (CPU).

Overhead: gRPC end to end minus the in-process pipeline, same request, batch 1, medians of alternating runs.
Throughput: videos a second at concurrency 8 over concurrency 1; where it is below the target, the stage times of both
loads say where the processor time went. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from turbo_backend.manifest import versions
from turbo_backend.pipeline import Pipeline
from turbo_backend.server.process import TritonServer
from turbo_backend.settings import Settings
from turbo_client import Client, Video

PROMPT = "A red cat walks to the left across a sunny meadow"


def measure_overhead(client: Client, pipeline: Pipeline, runs: int) -> dict[str, object]:
    served, direct = [], []
    for run in range(runs + 1):  # the first is the warm-up
        # A prompt of its own each time, so that the text cache helps neither side.
        prompt = f"{PROMPT}, take {run}"
        started = time.perf_counter()
        pipeline.generate(prompt, seed=1)
        direct.append(time.perf_counter() - started)
        started = time.perf_counter()
        client.generate(prompt, seed=1)
        served.append(time.perf_counter() - started)
    direct_ms, served_ms = (1000 * statistics.median(times[1:]) for times in (direct, served))
    target = max(50.0, 0.05 * direct_ms)
    overhead = served_ms - direct_ms
    print(f"in process {direct_ms:8.1f} ms   gRPC {served_ms:8.1f} ms   overhead {overhead:6.1f} ms  (<= {target:.1f})")
    return {
        "in_process_ms": round(direct_ms, 1),
        "grpc_ms": round(served_ms, 1),
        "value": round(overhead, 1),
        "target": round(target, 1),
        "met": overhead <= target,
    }


def measure_throughput(client: Client, videos: int, concurrency: int) -> tuple[float, list[Video]]:
    def run(index: int) -> Video:
        return client.generate(f"{PROMPT}, number {index}", seed=index + 1)

    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        made = list(pool.map(run, range(videos)))
    return videos / (time.perf_counter() - started), made


def stage_seconds(videos: list[Video]) -> dict[str, float]:
    """Seconds of work in each stage for a video; a batch's time is shared by its members, step by step."""
    totals: dict[str, float] = {}
    for video in videos:
        for stage, facts in video.report["stages"].items():
            milliseconds = facts.get("step_milliseconds", [facts["milliseconds"]])
            sizes = facts.get("batch_sizes", [facts.get("batch_size", 1)])
            shares = [each / size for each, size in zip(milliseconds, sizes, strict=True)]
            totals[stage] = totals.get(stage, 0.0) + sum(shares) / 1000
    return {stage: round(total / len(videos), 3) for stage, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--videos", type=int, default=16)
    arguments = parser.parse_args()
    pipeline = Pipeline.from_settings(Settings.from_environment())
    with TritonServer() as server, Client(server.grpc_url) as client:
        overhead = measure_overhead(client, pipeline, arguments.runs)
        measure_throughput(client, 8, 8)  # warm-up of the batched shapes
        alone, alone_videos = measure_throughput(client, arguments.videos // 2, 1)
        together, together_videos = measure_throughput(client, arguments.videos, 8)
    ratio = together / alone
    sizes = [video.report["stages"]["denoiser"]["batch_size"] for video in together_videos]
    print(f"concurrency 1: {alone:.3f} videos/s   8: {together:.3f} videos/s   ratio {ratio:.2f}  (>= 1.5)")
    print(f"denoiser batch sizes at concurrency 8: {sizes}")
    for label, videos in (("concurrency 1", alone_videos), ("concurrency 8", together_videos)):
        print(f"seconds of stage time a video, {label}: {stage_seconds(videos)}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(
        json.dumps(
            {
                "bench": "serving",
                "overhead": overhead,
                "throughput": {
                    "concurrency_1": round(alone, 3),
                    "concurrency_8": round(together, 3),
                    "value": round(ratio, 2),
                    "target": 1.5,
                    "met": ratio >= 1.5,
                    "batch_sizes": sizes,
                    "stage_seconds_1": stage_seconds(alone_videos),
                    "stage_seconds_8": stage_seconds(together_videos),
                },
                "processors": os.cpu_count(),
                "versions": versions(),
                "commit": commit,
            }
        )
    )


if __name__ == "__main__":
    main()
