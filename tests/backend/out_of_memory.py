"""Runs out of memory on purpose, and measures memory; started by test_out_of_memory.py as a process of its own.

    python out_of_memory.py exhaust   # prints what long requests under a limit end in, and whether short ones work
    python out_of_memory.py measure   # prints estimated and measured bytes of workspace

The last line is JSON.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from turbo_backend.config import MODELS
from turbo_backend.errors import TurboError
from turbo_backend.memory import decoder_bytes, denoiser_bytes
from turbo_backend.parameters import Delivery, make_parameters
from turbo_backend.settings import Settings
from turbo_backend.stages.denoiser_request import DenoiseRequest
from turbo_backend.stages.loading import load_denoiser, load_text_encoder, load_vae_decoder
from turbo_backend.stages.vae_decoder import DecodedVideo, DecodeRequest

CPU = torch.device("cpu")
HEADROOM = 40 << 20
SETTINGS = Settings.from_environment({"TURBO_DEVICE": "cpu", "TURBO_NUM_THREADS": "2"})
TEXT_ENCODER = load_text_encoder(SETTINGS)
DENOISER = load_denoiser(SETTINGS)
VAE_DECODER = load_vae_decoder(SETTINGS)


def denoise(**values: object) -> tuple[torch.Tensor, dict[str, object]]:
    (encoded,) = TEXT_ENCODER.encode(["a red fox"])
    if isinstance(encoded, TurboError):
        raise encoded
    request = DenoiseRequest(
        text_embeddings=encoded.embeddings, text_length=encoded.length, values=values, report=encoded.report()
    )
    *_, (_, last) = DENOISER.denoise([request])
    if isinstance(last, TurboError):
        raise last
    assert last.latents is not None
    assert last.report is not None
    return last.latents, last.report


def decode(latents: torch.Tensor, report: dict[str, object], container: str = "mp4") -> DecodedVideo:
    request = DecodeRequest(latents=latents, report=report, delivery=Delivery(container=container))
    *_, (_, last) = VAE_DECODER.decode({0: request})
    if isinstance(last, TurboError):
        raise last
    assert isinstance(last, DecodedVideo)
    return last


def exhaust() -> dict[str, object]:
    """Long requests with the address space limited to a little more than there is now, short ones before and after."""
    short = {"SEED": 3, "NUM_STEPS": 1, "NUM_FRAMES": 5}
    latents, report = denoise(**short)
    before = decode(latents, report)
    long_latents = latents.repeat(1, 40, 2, 1)
    tasks: dict[str, Callable[[], object]] = {
        "denoiser": lambda: denoise(NUM_STEPS=1, NUM_FRAMES=257, ASPECT_RATIO="1:1", ATTENTION_TYPE="sla"),
        "vae_decoder": lambda: decode(long_latents, report, "raw"),
    }
    messages, same = {}, {}
    for name, task in tasks.items():
        _, no_limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + HEADROOM, no_limit))
        try:
            task()
            messages[name] = "it was enough"
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_AS, (no_limit, no_limit))
        same[name] = decode(*denoise(**short)).mp4 == before.mp4
    return {"messages": messages, "same": same}


def measure() -> dict[str, object]:
    """Peak growth of resident memory against the estimates, by what was run."""
    model, dtype = MODELS["tiny"], SETTINGS.dtype
    outcome: dict[str, tuple[int, int]] = {}
    for attention_type in ("original", "sla", "sagesla"):
        values = {"SEED": 1, "NUM_STEPS": 1, "NUM_FRAMES": 21, "ATTENTION_TYPE": attention_type}
        parameters = make_parameters(model, values, seed=1)
        estimate = denoiser_bytes(model.dit, parameters, dtype, provider=SETTINGS.provider, device=CPU)
        grown, (latents, report) = _growth(lambda values=values: denoise(**values))
        outcome[attention_type] = (estimate, grown)
    estimate = decoder_bytes(model.vae, parameters, dtype, device=CPU)
    for container in ("raw", "mp4"):
        grown, _ = _growth(lambda container=container: decode(latents, report, container))
        outcome[container] = (estimate, grown)
    return {"bytes": outcome}


def _growth(task: Callable[[], object]) -> tuple[int, object]:
    """How much more memory was resident at the highest point of `task` than before it, and its result."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    result = task()
    return _status("VmHWM") - before, result


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    print(json.dumps({"exhaust": exhaust, "measure": measure}[sys.argv[1]]()))
