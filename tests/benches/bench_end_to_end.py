"""Prompt (and image) to MP4 through a running server: what a caller waits, where the time goes, what it takes of a GPU.

    turbodiffusion-server serve --model Wan2.1-1.3B &
    python tests/benches/bench_end_to_end.py --url 127.0.0.1:8001 --runs 5 --target 1.45 --target-gib 24

Each run has a prompt of its own, and with `--image WIDTHxHEIGHT` an image, so that no cache helps; the first `--warmup`
runs do not count. With images one more run repeats the last of them: what its cache saves. Memory is the most that all
processes on the GPU held at one time; each stage's peak, as it reports it, stands beside the prediction of
`turbo_backend.planner`. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from processes import watched_gpus

from turbo_backend.config import find_model
from turbo_backend.parameters import make_parameters
from turbo_backend.planner import plan_memory
from turbo_client import Client, Video

PROMPT = "A stylish woman walks down a Tokyo street filled with warm glowing neon, wet pavement, 电影感, take {}"
GIB = 2**30
#: Targets of the image encoder, milliseconds.
IMAGE_TARGETS = {"new": 900.0, "cached": 5.0}
Report = Mapping[str, Any]
Row = dict[str, Any]


class GpuWatch:
    """Samples the memory used of watched GPUs ten times a second, as nvidia-smi tells; nothing where there is none."""

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._smi: subprocess.Popen[str] | None = None

    def __enter__(self) -> GpuWatch:
        if shutil.which("nvidia-smi") is not None:
            query = ["--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "--loop-ms=100"]
            self._smi = subprocess.Popen(["nvidia-smi", *watched_gpus(), *query], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, args=(self._smi,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._smi is not None:
            self._smi.terminate()
            self._smi.wait()

    def _read(self, smi: subprocess.Popen[str]) -> None:
        assert smi.stdout is not None
        for line in smi.stdout:
            index, mebibytes = line.split(",")
            self._samples[index].append(float(mebibytes))

    @property
    def peak_gib(self) -> float | None:
        """Of each GPU the most, summed."""
        return sum(max(samples) for samples in self._samples.values()) / 1024 if self._samples else None


def draw_image(size: str, seed: int) -> bytes:
    """A JPEG of smooth colours, another for each seed."""
    width, height = map(int, size.split("x"))
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def row(name: str, value: float, unit: str, target: float | None) -> Row:
    met = None if target is None else value <= target
    return {"name": name, "value": round(value, 3), "unit": unit, "target": target, "met": met}


def memory_rows(report: Report, *, quant_text_encoder: bool) -> Iterator[Row]:
    """Each stage's peak as reported, in GiB, beside what the planner says of the same request."""
    stages = {name: facts for name, facts in report["stages"].items() if "gpu_peak_bytes" in facts}
    if not stages:
        return
    model, video = find_model(report["model"]), report["video"]
    parameters = make_parameters(
        model,
        {"RESOLUTION": report["parameters"]["resolution"], "NUM_FRAMES": video["num_frames"]},
        seed=1,
        image_size=(video["width"], video["height"]) if model.takes_image else None,
    )
    placement = report["stages"]["denoiser"].get("expert_placement", "resident")
    planned = plan_memory(
        model,
        parameters,
        dtype=getattr(torch, report["dtype"]),
        quant_linear=report["linear_kind"] in ("int8", "fp8"),
        quant_text_encoder=quant_text_encoder,
        placement=placement,
    )
    for name, facts in stages.items():
        measured = facts["gpu_peak_bytes"]  # of all GPUs, where the plan is that of one
        num_gpus = model.num_experts if (name, placement) == ("denoiser", "spread") else 1
        predicted = num_gpus * (planned[name].weights + planned[name].workspace)
        yield {
            **row(f"planner, {name}: predicted over measured", predicted / measured, "", None),
            "met": abs(predicted / measured - 1) <= 0.1,
            "predicted_gib": round(predicted / GIB, 2),
            "measured_gib": round(measured / GIB, 2),
            "reserved_gib": round(facts["gpu_reserved_bytes"] / GIB, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--resolution")
    parser.add_argument("--attention-type", default="sagesla")
    parser.add_argument("--image", metavar="WIDTHxHEIGHT", help="make each video from an image of this size")
    parser.add_argument("--quant-text-encoder", action="store_true", help="the server runs it in 8 bits")
    parser.add_argument("--target", type=float, help="seconds that the median shall not exceed")
    parser.add_argument("--target-gib", type=float, help="memory that all processes together shall not exceed")
    parser.add_argument("--commit", help="of the measured tree")
    parser.add_argument("--save", type=Path, help="keep the last video here")
    arguments = parser.parse_args()

    seconds: list[float] = []
    images: dict[str, list[float]] = {"new": [], "cached": []}
    total = arguments.warmup + arguments.runs
    with Client(arguments.url, timeout=600) as client, GpuWatch() as gpus:
        client.wait_ready()

        def generate(run: int, seed: int) -> Video:
            return client.generate(
                PROMPT.format(run),
                seed=run + 1,
                num_steps=arguments.num_steps,
                num_frames=arguments.num_frames,
                resolution=arguments.resolution,
                attention_type=arguments.attention_type,
                **({"image": draw_image(arguments.image, seed)} if arguments.image else {}),
            )

        for run in range(total + bool(arguments.image)):
            started = time.perf_counter()
            video = generate(run, min(run, total - 1))
            elapsed = time.perf_counter() - started
            stages = video.report["stages"]
            print(f"run {run}: {elapsed:.3f} s   {_milliseconds(stages)}", flush=True)
            if arguments.warmup <= run < total:
                seconds.append(elapsed)
            if arguments.image and run >= arguments.warmup:
                facts = stages["image_encoder"]
                images["cached" if facts["cache_hit"] else "new"].append(facts["milliseconds"])
    if arguments.save:
        video.save(arguments.save)

    report = video.report
    kind = (
        f"{report['model']} {report['parameters']['resolution']}, {arguments.num_steps} steps, {report['linear_kind']}"
    )
    rows = [row(f"prompt to MP4 through the server, {kind}", statistics.median(seconds), "s", arguments.target)]
    rows += [
        row(f"encode of a {which} image", statistics.median(times), "ms", IMAGE_TARGETS[which])
        for which, times in images.items()
        if times
    ]
    if gpus.peak_gib is not None:
        rows.append(row(f"most GPU memory of all processes, {kind}", gpus.peak_gib, "GiB", arguments.target_gib))
    rows += memory_rows(report, quant_text_encoder=arguments.quant_text_encoder)
    for one in rows:
        print(json.dumps(one))
    print(
        json.dumps(
            {
                "bench": "end_to_end",
                "commit": arguments.commit,
                "rows": rows,
                "seconds": [round(run, 3) for run in seconds],
                "report": report,
            },
            ensure_ascii=False,
        )
    )


def _milliseconds(stages: Report) -> dict[str, object]:
    """What each stage took, and what the MP4 added after the last frame."""
    found: dict[str, object] = {name: facts["milliseconds"] for name, facts in stages.items()}
    found["steps"] = stages["denoiser"]["step_milliseconds"]
    found["forwards"] = stages["denoiser"]["forward_milliseconds"]
    found["video_encoder_after_decode"] = stages["video_encoder"]["milliseconds_after_decode"]
    return found


if __name__ == "__main__":
    main()
