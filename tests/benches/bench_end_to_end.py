"""Prompt to MP4 through a running server: what a caller waits, and where the time goes.

    turbodiffusion-server serve --model Wan2.1-1.3B &
    python tests/benches/bench_end_to_end.py --url 127.0.0.1:8001 --runs 5 --target 1.45

Each run has a prompt of its own, so that the text cache helps none; the first `--warmup` runs do not count. The last
stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from turbo_client import Client

PROMPT = "A stylish woman walks down a Tokyo street filled with warm glowing neon, wet pavement, 电影感, take {}"


def gpu_memory() -> list[dict[str, str]]:
    """Name and memory of each GPU as nvidia-smi tells, none where there is no such program."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = ("name", "memory.used", "memory.total", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [dict(zip(fields, (part.strip() for part in line.split(",")), strict=True)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--resolution")
    parser.add_argument("--attention-type", default="sagesla")
    parser.add_argument("--target", type=float, help="seconds that the median shall not exceed")
    parser.add_argument("--save", type=Path, help="keep the last video here")
    arguments = parser.parse_args()

    seconds: list[float] = []
    with Client(arguments.url, timeout=600) as client:
        client.wait_ready()
        for run in range(arguments.warmup + arguments.runs):
            started = time.perf_counter()
            video = client.generate(
                PROMPT.format(run),
                seed=run + 1,
                num_steps=arguments.num_steps,
                num_frames=arguments.num_frames,
                resolution=arguments.resolution,
                attention_type=arguments.attention_type,
            )
            elapsed = time.perf_counter() - started
            stages = {name: facts["milliseconds"] for name, facts in video.report["stages"].items()}
            print(f"run {run}: {elapsed:.3f} s   {stages}", flush=True)
            if run >= arguments.warmup:
                seconds.append(elapsed)
    if arguments.save:
        video.save(arguments.save)
    value = statistics.median(seconds)
    print(
        json.dumps(
            {
                "bench": "end_to_end",
                "value": round(value, 3),
                "target": arguments.target,
                "met": None if arguments.target is None else value <= arguments.target,
                "seconds": [round(run, 3) for run in seconds],
                "gpu": gpu_memory(),
                "report": video.report,
            },
            ensure_ascii=False,
        )
    )


if __name__ == "__main__":
    main()
