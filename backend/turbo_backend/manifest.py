"""What made a video, in enough detail to make it again: versions, weights, parameters, seed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from functools import cache

import numpy
import torch

import turbo_backend

#: Raised when a field changes its meaning.
MANIFEST_VERSION = 1


@cache
def versions() -> dict[str, str]:
    """Versions of everything that can change a pixel."""
    found = {
        "turbodiffusion_server": turbo_backend.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    if torch.cuda.is_available():
        import triton

        found["triton"] = triton.__version__
        found["cuda"] = torch.version.cuda or "none"
    return found


def device_name(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3` or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def merge_reports(*reports: Mapping[str, object]) -> dict[str, object]:
    """One report of what several stages said: `stages` and `weights` joined, `notes` in order, the rest by name."""
    merged: dict[str, object] = {}
    for report in reports:
        for key, value in report.items():
            before = merged.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                merged[key] = {**before, **value}
            elif isinstance(before, list) and isinstance(value, list):
                merged[key] = [*before, *value]
            else:
                merged[key] = value
    return merged


def make_manifest(report: Mapping[str, object]) -> str:
    """The replay manifest as JSON, from a denoiser's report; it holds no time, so equal requests give equal files."""
    kept = [
        "model",
        "ensemble",
        "prompt",
        "seed",
        "parameters",
        "weights",
        "attention",
        "linear_kind",
        "dtype",
        "device",
        "versions",
    ]
    if "image" in report:
        kept.append("image")
    manifest = {"turbodiffusion_manifest": MANIFEST_VERSION, **{key: report[key] for key in kept}}
    return json.dumps(manifest, ensure_ascii=False, sort_keys=True)
