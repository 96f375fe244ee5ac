"""`make demo`: starts the real Triton server, makes one video through the SDK, stops the server.

The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.console import Console

from turbo_backend.server.process import TritonServer
from turbo_client import Client

PROMPT = "A red cat walks to the left across a sunny meadow, 电影感"


def main() -> None:
    console = Console(stderr=True)
    output = Path("out")
    output.mkdir(exist_ok=True)
    started = time.perf_counter()
    console.print("Starting Triton Inference Server with the embedded tiny model ...")
    with TritonServer() as server, Client(server.grpc_url) as client:
        ready = time.perf_counter() - started
        console.print(f"Ready after {ready:.1f} s at grpc://{server.grpc_url}")
        console.print(f"Prompt: {PROMPT}")
        triton = client.status().version
        with client.stream(PROMPT, seed=42) as stream:
            for progress in stream:
                console.print(f"  {progress.stage:12} {progress.step}/{progress.num_steps}  {progress.seconds:5.1f} s")
            video = stream.result()
        path = output / "demo.mp4"
        video.save(path)
    seconds = time.perf_counter() - started
    shown = video.report["video"]
    console.print(f"Wrote {path} in {seconds:.1f} s, server start and stop included")
    print(
        json.dumps(
            {
                "video": str(path),
                "frames": shown["num_frames"],
                "width": shown["width"],
                "height": shown["height"],
                "fps": shown["fps"],
                "seed": video.seed,
                "seconds": round(seconds, 2),
                "triton": triton,
                "attention": video.report["attention"],
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
